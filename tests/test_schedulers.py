"""Each sampler follows diffusers' scheduler, with every setting of its config; and each field of a
scheduler's config is followed, refused or reported.
"""

import inspect

import diffusers
import numpy as np
import pytest
import torch

import tiny_sd
from conftest import record
from extras import checks, like_diffusers, samplers

pytestmark = pytest.mark.slow

PLAIN = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
         "steps_offset": 1, "clip_sample": False}
V, ZERO = {"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True}
LINSPACE, TRAILING = {"timestep_spacing": "linspace"}, {"timestep_spacing": "trailing"}
KARRAS = {"use_karras_sigmas": True}
CONFIGS = [     # class, fields
    ("DDPM", {}), ("DDPM", {"variance_type": "fixed_large"}), ("DDPM", V | ZERO | TRAILING),
    ("DDPM", {"variance_type": "fixed_large"} | TRAILING),
    ("DDIM", {}), ("DDIM", LINSPACE), ("DDIM", TRAILING), ("DDIM", V | ZERO | TRAILING),
    ("DDIM", V | TRAILING), ("DDIM", {"set_alpha_to_one": False} | LINSPACE),
    ("DDIM", {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}),
    ("DDIM", {"beta_schedule": "squaredcos_cap_v2"}),
    ("PNDM", {"skip_prk_steps": True}), ("PNDM", {"skip_prk_steps": True} | V),
    ("PNDM", {"skip_prk_steps": True} | LINSPACE), ("PNDM", {"skip_prk_steps": True} | TRAILING),
    ("PNDM", {}), ("PNDM", V), ("PNDM", LINSPACE),
    ("EulerDiscrete", {}), ("EulerDiscrete", V | ZERO | TRAILING), ("EulerDiscrete", ZERO),
    ("EulerDiscrete", KARRAS | {"sigma_min": 0.1, "sigma_max": 9.0}),
    ("EulerDiscrete", KARRAS | {"timestep_type": "continuous"} | V),
    ("EulerDiscrete", TRAILING | {"timestep_type": "continuous"} | V),
    ("EulerDiscrete", KARRAS | {"timestep_type": "continuous"}),
    ("EulerDiscrete", {"beta_schedule": "linear"}),
    ("EulerAncestralDiscrete", V | ZERO | TRAILING),
    ("DPMSolverMultistep", V | ZERO | TRAILING), ("DPMSolverMultistep", KARRAS),
    ("DPMSolverMultistep", KARRAS | {"sigma_min": 0.1, "sigma_max": 9.0}),
    ("LCM", {"original_inference_steps": 20}), ("LCM", {"original_inference_steps": 100} | V)]


def output(x, t):
    """Return a plausible output of a model for any x and t, even times that are log σ / 4."""
    shift = np.sin(t) if abs(t) < 10 else t / 300
    return np.sin(2 * np.asarray(x, np.float64) + shift) + 0.3 * np.asarray(x)


@pytest.mark.parametrize("n", [2, 7, 13, 20])
@pytest.mark.parametrize("kind, fields", CONFIGS, ids=lambda value: value if isinstance(
    value, str) else "-".join(map(str, value.values())))
def test_a_walk_is_the_schedulers(kind, fields, n):
    torch.manual_seed(0)
    if kind == "PNDM" and "skip_prk_steps" not in fields:
        n = max(n, 4)       # fewer are an error in diffusers
    reference = getattr(diffusers, f"{kind}Scheduler").from_config(PLAIN | fields)
    reference.set_timesteps(n)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 4, 4, 4, generator=generator) * reference.init_noise_sigma
    for t in reference.timesteps:
        seen = reference.scale_model_input(x, t)
        there = torch.from_numpy(output(seen, float(t))).float()
        options = {"generator": generator} if "generator" in inspect.signature(
            reference.step).parameters else {}
        x = reference.step(there, t, x, **options).prev_sample

    settings = {"_class_name": f"{kind}Scheduler", **reference.config}
    config = tiny_sd.read_config("scheduler", settings)
    levels = like_diffusers.noise_levels(config)
    sampler = tiny_sd.SAMPLERS[samplers.SCHEDULERS[f"{kind}Scheduler"]]
    steps = like_diffusers.sampling_steps(sampler, n, config, levels)

    def denoise(x, t, alpha_bar):
        there = output(x, t).astype(np.float32)
        return tiny_sd.split_prediction(config.prediction_type, there, x, alpha_bar)

    noise = like_diffusers.torch_noise([5], (4, 4, 4))
    start = noise() * like_diffusers.initial_scale(sampler, config, steps)
    walk = getattr(sampler, "configured", lambda *_: sampler)(config, steps, levels, True)
    *_, ours = walk(denoise, start, steps, noise)
    theirs = x.permute(0, 2, 3, 1).numpy()
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    record(f"a walk of {kind}", error)
    assert error < (2e-3 if levels[-1] < 1e-6 else 1e-4)       # float32 at σ = 4096 has no more


@pytest.mark.parametrize("kind, last", [("epsilon", 2 ** -24), ("v_prediction", 0)])
def test_noise_says_nothing_of_a_picture_that_is_all_noise(kind, last):
    """So a model that predicts noise is never called there, whatever its config says."""
    config = tiny_sd.read_config("scheduler", PLAIN | ZERO | {"prediction_type": kind})
    assert like_diffusers.noise_levels(config)[-1] == last


IDLE = {"self", "args", "kwargs", "clip_sample_range",  # without what is refused or named
        "dynamic_thresholding_ratio", "sample_max_value",
        *("flow_shift", "time_shift_type", "shift_terminal", "use_dynamic_shifting")}


@pytest.mark.parametrize("name", samplers.SCHEDULERS)
def test_every_field_of_a_scheduler_is_known(name):
    """In its diffusers class: followed, refused or reported; none is forgotten.

    timestep_scaling does not affect TCD's steps.
    """
    for field in inspect.signature(getattr(diffusers, name).__init__).parameters:
        named = checks.replaced_settings({"scheduler": {"_class_name": name, field: "x"},
                                          "unet": {}, "vae": {}})
        assert (field in {*checks.CONFIG_FIELDS["scheduler"], *checks.FIXED["scheduler"], *IDLE}
                or (name, field) == ("TCDScheduler", "timestep_scaling")
                or any(f"{field} is " in line for line in named)), field
