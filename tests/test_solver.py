"""Each solver's step is that of diffusers' own scheduler, on the same grid, ending at the same noise."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from craftor.solver import add_noise, begun_at, schedule, trailing

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}


def ours(prediction_type: str = "epsilon", **extra) -> DDIMScheduler:
    return DDIMScheduler(**CONFIG, prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=False, **extra)


def run(steps, outputs: list[torch.Tensor], latents: torch.Tensor) -> list[torch.Tensor]:
    previous, found = None, []
    for step, output in zip(steps, outputs, strict=True):
        x0 = step.x0(latents, output)
        latents, previous = step.advance(latents, x0, previous), x0
        found.append(latents)
    return found


def noise(count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    latents, *outputs = (torch.randn(2, 4, 8, 8, generator=g, dtype=torch.float64) for _ in range(count + 1))
    return latents, outputs


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("num_steps", [1, 5, 20, 25])
def test_ddim_steps_as_diffusers_does(prediction_type: str, num_steps: int) -> None:
    reference = ours(prediction_type)
    reference.set_timesteps(num_steps)
    latents, outputs = noise(num_steps)
    found = run(schedule(reference, "ddim", num_steps), outputs, latents)
    for index, timestep in enumerate(reference.timesteps):
        latents = reference.step(outputs[index], timestep, latents).prev_sample
        torch.testing.assert_close(found[index], latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddim_is_euler_in_sigma(prediction_type: str) -> None:
    reference = EulerDiscreteScheduler(**CONFIG, prediction_type=prediction_type)
    reference.set_timesteps(20)
    steps = schedule(ours(prediction_type), "euler", 20)
    latents, outputs = noise(20)
    found = run(steps, outputs, latents)
    scaled = latents / steps[0].alpha
    # All but the last: diffusers' Euler ends without noise, ours at the first training timestep's level.
    for index, timestep in enumerate(reference.timesteps[:-1]):
        reference.scale_model_input(scaled, timestep)
        scaled = reference.step(outputs[index], timestep, scaled).prev_sample
        torch.testing.assert_close(found[index] / steps[index + 1].alpha, scaled, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("num_steps", [4, 20])
def test_dpm_solver_steps_as_diffusers_does(prediction_type: str, num_steps: int) -> None:
    reference = DPMSolverMultistepScheduler(**CONFIG, prediction_type=prediction_type, final_sigmas_type="sigma_min")
    reference.set_timesteps(num_steps)
    latents, outputs = noise(num_steps)
    found = run(schedule(ours(prediction_type), "dpm_solver_2m", num_steps), outputs, latents)
    for index, timestep in enumerate(reference.timesteps):
        latents = reference.step(outputs[index], timestep, latents).prev_sample
        torch.testing.assert_close(found[index], latents, rtol=1e-4, atol=1e-4)


def test_a_chain_that_begins_under_way_has_no_step_before_its_first() -> None:
    reference = DPMSolverMultistepScheduler(**CONFIG, final_sigmas_type="sigma_min")
    reference.set_timesteps(20)
    reference.set_begin_index(8)
    latents, outputs = noise(12)
    whole = schedule(ours(), "dpm_solver_2m", 20)
    steps = begun_at(whole, 8)
    assert len(steps) == 20 and begun_at(whole, 0) is whole
    found = run(steps[8:], outputs, latents)
    for index, timestep in enumerate(reference.timesteps[8:]):
        latents = reference.step(outputs[index], timestep, latents).prev_sample
        torch.testing.assert_close(found[index], latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["ddim", "euler", "dpm_solver_2m"])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("num_steps", [10, 15, 20, 25, 30, 50])
def test_every_solver_keeps_a_perfectly_known_image(solver: str, zero_snr: bool, num_steps: int) -> None:
    """A network that knows image and noise leads from any start to the image at the final noise level."""
    scheduler = ours("v_prediction", rescale_betas_zero_snr=zero_snr)
    steps = schedule(scheduler, solver, num_steps)
    (image, (known,)) = noise(1)
    latents = add_noise(steps[0], image, known)
    outputs = [step.alpha * known - step.sigma * image for step in steps]
    final = scheduler.alphas_cumprod[0].double()
    expected = final.sqrt() * image + (1 - final).sqrt() * known
    torch.testing.assert_close(run(steps, outputs, latents)[-1], expected, rtol=1e-9, atol=1e-9)


def test_schedule_is_trailing() -> None:
    assert trailing(1000, 25) == list(range(999, 38, -40))
    for num_steps in (10, 15, 20, 30, 50):
        reference = ours()
        reference.set_timesteps(num_steps)
        assert trailing(1000, num_steps) == reference.timesteps.tolist()


@given(st.integers(1, 1000))
@settings(max_examples=30, deadline=None)
def test_a_schedule_starts_at_the_noisiest_timestep(num_steps: int) -> None:
    found = trailing(1000, num_steps)
    assert len(found) == num_steps and found[0] == 999 and found == sorted({*found}, reverse=True) and found[-1] >= 0


def test_impossible_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown solver 'heun'; available: ddim, euler, dpm_solver_2m"):
        schedule(ours(), "heun", 5)
    with pytest.raises(ValueError, match="num_steps = 2000: allowed are 1 to 1000"):
        schedule(ours(), "ddim", 2000)
    with pytest.raises(ValueError, match="needs v prediction"):
        schedule(ours("epsilon", rescale_betas_zero_snr=True), "ddim", 5)
