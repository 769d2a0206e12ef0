"""Variations of guidance: rescaled, in an interval of noise levels only, with several prompts.

`combine` below is a function like tiny_sd.guide, which like_diffusers.denoiser calls instead of
it: combine(output with the negative prompt, outputs with the prompts ..., scale).
"""

from tiny_sd import guide, split_prediction


def combining(make_denoiser, combine):
    """Return make_denoiser, changed so that its denoisers use this combine()."""
    return lambda *args: make_denoiser(*args, combine)


def composed(weights):
    """Return a function like guide for several prompts: ε_u + s Σ wᵢ (εᵢ - ε_u) (9.17).

    Liu et al., 2022. This multiplies the prompts' distributions; guidance multiplies one
    distribution with a power of itself.
    """
    def combine(uncond, *conds):
        *conds, scale = conds
        pushes = [weight * (cond - uncond) for weight, cond in zip(weights, conds, strict=True)]
        return uncond + scale * sum(pushes)
    return combine


def rescaled(phi, combine=guide):
    """Return a function like guide that moves its standard deviation towards cond's by phi (9.18).

    Lin et al., 2024, §3.4: guidance spreads the values, which overexposes pictures. phi: 0 to 1.
    """
    def rescale(*outputs):
        *conditions, _ = outputs
        guided, cond = combine(*outputs), combine(*conditions, 1.0)
        axes = tuple(range(1, guided.ndim))
        ratio = cond.std(axis=axes, keepdims=True) / guided.std(axis=axes, keepdims=True)
        return guided * (phi * ratio + 1 - phi)
    return rescale


def within(make_denoiser, low, high):
    """Return make_denoiser, changed so that its denoisers guide only at times from low to high.

    low and high are fractions of the model's times; 1 is pure noise. At other times only the
    prompt's output is computed, which halves the work; several prompts are combined at scale 1.
    Kynkäänniemi et al., 2024.
    """
    def make(model, context, guidance=1.0, pooled=None, *others):
        guided = make_denoiser(model, context, guidance, pooled, *others)
        if len(context) == 1:       # no guidance
            return guided
        first = 1 if len(context) == 2 else 0       # combining prompts needs the negative one, too
        alone = make_denoiser(model, context[first:], 1.0,
                              None if pooled is None else pooled[first:], *others)

        def denoise(x_t, t, alpha_bar):
            inside = low <= t / len(model.alpha_bars) <= high
            return (guided if inside else alone)(x_t, t, alpha_bar)
        return denoise
    return make


def with_plain_noise(make_denoiser):
    """Return make_denoiser, changed so that its denoisers guide x̂_0 but not ε̂ (9.19).

    They return the ε̂ of the negative prompt. CFG++: Chung et al., 2024.
    """
    def make(model, context, guidance=1.0, pooled=None, extra_channels=None, combine=guide, **how):
        kind, plain = model.config.scheduler.prediction_type, []

        def combined(uncond, *others):
            plain[:] = [uncond]
            return combine(uncond, *others)

        guided = make_denoiser(model, context, guidance, pooled, extra_channels, combined, **how)

        def denoise(x_t, t, alpha_bar):
            x_0, eps = guided(x_t, t, alpha_bar)
            if plain:
                _, eps = split_prediction(kind, plain.pop(), x_t, alpha_bar)
            return x_0, eps
        return denoise
    return make
