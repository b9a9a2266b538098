"""A tuned encoder -> files that other programs read: a diffusers folder, or a ComfyUI text encoder file."""

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from craftor.diffuser import Diffuser
from craftor.encoders import Encoder


def published(module: nn.Module) -> dict[str, Tensor]:
    """Weights under the names that CLIP text encoders are published with: `text_model.encoder.layers.0...`.

    Recent transformers drop the first part in memory and read both; everything older, and ComfyUI, only knows these.
    """
    return {
        key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}": value.contiguous()
        for key, value in module.state_dict().items()
    }


def to_diffusers(encoder: Encoder, base: Diffuser, out: Path) -> list[Path]:
    """`text_encoder/` and `tokenizer/` as in a pipeline's folder, with a model card; returns the folders."""
    folders = []
    for part, module in encoder.modules.items():
        folders += [out / part, out / part.replace("text_encoder", "tokenizer")]
        folders[-2].mkdir(parents=True, exist_ok=True)
        module.config.save_pretrained(folders[-2])
        save_file(published(module), folders[-2] / "model.safetensors", metadata={"format": "pt"})
        base.tokenizers[part].save_pretrained(folders[-1])
    (out / "README.md").write_text(card(encoder))
    return [*folders, out / "README.md"]


def to_comfyui(encoder: Encoder, base: Diffuser, out: Path) -> list[Path]:
    """One file a part for ComfyUI's `models/text_encoders` (CLIPLoader), and the model card; returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for part, module in encoder.modules.items():
        stem = "-".join(filter(None, (encoder.name, encoder.version, part.removeprefix("text_encoder").strip("_"))))
        files.append(out / f"{stem}.safetensors")
        metadata = {"format": "pt", "craftor": encoder.uri, "sha256": encoder.sha256}
        save_file(published(module), files[-1], metadata=metadata)
    (out / "README.md").write_text(card(encoder))
    return [*files, out / "README.md"]


FORMATS: dict[str, Callable[[Encoder, Diffuser, Path], list[Path]]] = {
    "diffusers": to_diffusers,
    "comfyui": to_comfyui,
}


def card(encoder: Encoder) -> str:
    """A model card: what it is, where it acts, where it comes from, how to use it."""
    about, (first, last) = encoder.description, encoder.window
    base, rewards = about["base"], about.get("rewards", {})
    trained = [f"- {name}: {reward['kind']}, weight {reward['weight']:g}" for name, reward in rewards.items()]
    parents = [f"- {parent['uri']}, weight {parent['weight']:g}" for parent in about.get("merged", [])]
    lineage = {
        "version": encoder.uri,
        "weights, sha256": encoder.sha256,
        "base text encoder, sha256": base["text_encoder_sha256"],
        **about.get("lineage", {}),
    }
    sections = {
        "Rewards": trained,
        "Merged from": parents,
        "Lineage": [f"- {key}: `{value}`" for key, value in lineage.items()],
        "Use": [
            "```python",
            "import craftor\n",
            f'craftor.apply(pipe, mix={{"path/to/this/folder": {{"weight": 1.0, "from": {first}, "to": {last}}}}})',
            "```",
        ],
    }
    return (
        "\n\n".join(
            [
                f"---\nbase_model: {base['model']}\nlibrary_name: diffusers\ntags: [text-encoder, craftor]\n---",
                f"# {encoder.name}",
                f"A text encoder ({', '.join(encoder.modules)}) of `{base['model']}`, tuned by reward for timesteps "
                f"{first} to {last} of 1000: use it there, and the original encoder at the others.",
                *(f"## {title}\n\n" + "\n".join(lines) for title, lines in sections.items() if lines),
            ]
        )
        + "\n"
    )
