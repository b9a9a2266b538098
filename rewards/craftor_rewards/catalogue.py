"""Public weights by short name: where they are, what they are, and the hashes they must have.

Revisions and hashes were read from public records of the very files (large-file pointers, names of cached blobs), not
computed here: none but the aesthetic head was at hand. Where a hash is None, the first fetch on a machine records what
it saw; see `loading`.
"""

from dataclasses import dataclass

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Weights:
    """One file of weights and the small ones beside it."""

    kind: str
    """A key of `craftor_rewards.REWARDS`, or "features", or "tokenizer"."""
    repo: str
    """`owner/name` on the Hugging Face hub, or the https address of the one file."""
    file: str
    gigabytes: float
    licence: str
    revision: str | None = None
    sha256: str | None = None
    beside: tuple[str, ...] = ("config.json", *TOKENIZER_FILES)
    """Other files of the repository; none where the file stands alone."""
    needs: tuple[str, ...] = ()
    """Other entries that the reward loads with it."""
    input_size: int | None = 224


_CLIP_LICENCE = "MIT (code; card names none)"

CATALOGUE: dict[str, Weights] = {
    "clip-vit-b-32": Weights(
        kind="clip_score",
        repo="openai/clip-vit-base-patch32",
        revision="3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268",
        file="pytorch_model.bin",
        sha256="a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f",
        gigabytes=0.61,
        licence=_CLIP_LICENCE,
    ),
    "clip-vit-l-14": Weights(
        kind="clip_score",
        repo="openai/clip-vit-large-patch14",
        revision="32bd64288804d66eefd0ccbe215aa642df71cc41",
        file="model.safetensors",
        sha256="a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
        gigabytes=1.71,
        licence=_CLIP_LICENCE,
    ),
    "clip-vit-h-14": Weights(
        kind="clip_score",
        repo="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        revision="1c2b8495b28150b8a4922ee1c8edee224c284c0c",
        file="model.safetensors",
        sha256="036e6e2bd49697511f4f8b8cb5ee465f93025f7a69a145eadeb9a881ace9b18d",
        gigabytes=3.94,
        licence="MIT",
    ),
    "clip-vit-g-14": Weights(
        kind="clip_score",
        repo="laion/CLIP-ViT-g-14-laion2B-s34B-b88K",
        revision="15efd0f6ac0c40c0f9da7becca03c974d7012604",
        file="open_clip_pytorch_model.bin",
        sha256="9ef136f407986fb607cd37a823eba38a3b6f95e8ec702b3d1687252985d84750",
        gigabytes=5.47,
        licence="MIT",
        beside=(),
        needs=("clip-tokenizer",),
    ),
    "laion-aesthetic-v2": Weights(
        kind="aesthetic",
        repo="https://raw.githubusercontent.com/christophschuhmann/improved-aesthetic-predictor/"
        "6934dd81792f086e613a121dbce43082cb8be85e/sac%2Blogos%2Bava1-l14-linearMSE.pth",
        file="sac+logos+ava1-l14-linearMSE.pth",
        sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
        gigabytes=0.004,
        licence="Apache-2.0",
        beside=(),
        needs=("clip-vit-l-14",),
    ),
    "pick-score-v1": Weights(
        kind="pick_score",
        repo="yuvalkirstain/PickScore_v1",
        revision="a4e4367c6dfa7288a00c550414478f865b875800",
        file="model.safetensors",
        sha256="ef31ef6fc5ff4d9bb90dd232df4e145887ba62c5a03aa2841415f8c25f18d52e",
        gigabytes=3.94,
        licence="MIT (code; card names none)",
    ),
    "hps-v2": Weights(
        kind="hps",
        repo="xswu/HPSv2",
        revision="697403c78157020a1ae59d23f111aa58ced35b0a",
        file="HPS_v2_compressed.pt",
        sha256="07cb0d20626232204ca3a6ec53ff5984e7e53212a8a7b0e0ec2bac1bdaf125a1",
        gigabytes=1.97,
        licence="Apache-2.0",
        beside=(),
        needs=("clip-tokenizer",),
    ),
    "hps-v2.1": Weights(
        kind="hps",
        repo="xswu/HPSv2",
        revision="697403c78157020a1ae59d23f111aa58ced35b0a",
        file="HPS_v2.1_compressed.pt",
        sha256="c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
        gigabytes=1.97,
        licence="Apache-2.0",
        beside=(),
        needs=("clip-tokenizer",),
    ),
    "image-reward-v1": Weights(
        kind="image_reward",
        repo="THUDM/ImageReward",
        file="ImageReward.pt",
        gigabytes=1.79,
        licence="Apache-2.0",
        beside=("med_config.json",),
        needs=("bert-tokenizer",),
    ),
    "dinov2-vit-b-14": Weights(
        kind="features",
        repo="facebook/dinov2-base",
        file="model.safetensors",
        gigabytes=0.35,
        licence="Apache-2.0",
        beside=("config.json",),
    ),
    "bert-tokenizer": Weights(
        kind="tokenizer",
        repo="google-bert/bert-base-uncased",
        file="tokenizer.json",
        gigabytes=0.0005,
        licence="Apache-2.0",
        beside=("vocab.txt", "tokenizer_config.json"),
        input_size=None,
    ),
    "clip-tokenizer": Weights(
        kind="tokenizer",
        repo="openai/clip-vit-base-patch32",
        revision="3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268",
        file="tokenizer.json",
        sha256="b556ac8c99757ffb677208af34bc8c6721572114111a6e0aaf5fa69ff0b8d842",
        gigabytes=0.002,
        licence=_CLIP_LICENCE,
        beside=("tokenizer_config.json",),
        input_size=None,
    ),
}
