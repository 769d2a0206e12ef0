"""The shapes of each network's weights as a checkpoint holds them, to check files and make some.

A name in a file is the path to the array: down_blocks.0.resnets.1.conv1.weight. flatten() of what
is returned here is {name: shape}.
"""


def norm_shapes(n):
    """Return the shapes of a normalisation of n channels."""
    return {"weight": (n,), "bias": (n,)}


def linear_shapes(i, o):
    """Return the shapes of a linear layer from i to o numbers."""
    return {"weight": (o, i), "bias": (o,)}


def bare_shapes(i, o):
    """Return the shapes of a linear layer without bias."""
    return {"weight": (o, i)}


def conv_shapes(i, o, size=3):
    """Return the shapes of a convolution from i to o channels."""
    return {"weight": (o, i, size, size), "bias": (o,)}


def resnet_shapes(i, o, temb=None):
    """Return the shapes of a ResBlock; temb: width of the time embedding, None in the VAE."""
    shapes = {"norm1": norm_shapes(i), "conv1": conv_shapes(i, o),
              "norm2": norm_shapes(o), "conv2": conv_shapes(o, o)}
    if temb:
        shapes["time_emb_proj"] = linear_shapes(temb, o)
    if i != o:
        shapes["conv_shortcut"] = conv_shapes(i, o, 1)
    return shapes


def attention_shapes(width, context, project=bare_shapes):
    """Return the shapes of attention: queries of `width` channels, keys and values of context."""
    return {"to_q": project(width, width), "to_k": project(context, width),
            "to_v": project(context, width), "to_out": [linear_shapes(width, width)]}


def transformer_shapes(width, context, depth=1):
    """Return the shapes of a transformer of `width` channels and words of `context` numbers.

    depth: how many blocks it has.
    """
    feed_forward = [{"proj": linear_shapes(width, 8 * width)}, None,
                    linear_shapes(4 * width, width)]
    block = {"norm1": norm_shapes(width), "attn1": attention_shapes(width, width),
             "norm2": norm_shapes(width), "attn2": attention_shapes(width, context),
             "norm3": norm_shapes(width), "ff": {"net": feed_forward}}
    return {"norm": norm_shapes(width), "proj_in": conv_shapes(width, width, 1),
            "transformer_blocks": [block] * depth, "proj_out": conv_shapes(width, width, 1)}


def text_shapes(config):
    """Return the shapes of the text encoder with this config."""
    width, wide = config.hidden_size, config.intermediate_size
    layer = {"layer_norm1": norm_shapes(width), "layer_norm2": norm_shapes(width),
             "self_attn": {f"{name}_proj": linear_shapes(width, width)
                           for name in ("q", "k", "v", "out")},
             "mlp": {"fc1": linear_shapes(width, wide), "fc2": linear_shapes(wide, width)}}
    embeddings = {"token_embedding": bare_shapes(width, config.vocab_size),
                  "position_embedding": bare_shapes(width, config.max_position_embeddings)}
    return {"embeddings": embeddings, "encoder": {"layers": [layer] * config.num_hidden_layers},
            "final_layer_norm": norm_shapes(width)}


def projected_text_shapes(config):
    """Return the shapes of a second text encoder, which has a projection at its end."""
    projection = bare_shapes(config.hidden_size, config.projection_dim)
    return text_shapes(config) | {"text_projection": projection}


def vae_shapes(config):
    """Return the shapes of the VAE with this config."""
    widths, n, z = config.block_out_channels, config.layers_per_block, config.latent_channels
    top = widths[-1]
    middle = {"resnets": [resnet_shapes(top, top)] * 2, "attentions": [
        {"group_norm": norm_shapes(top), **attention_shapes(top, top, linear_shapes)}]}

    def levels(widths, n, resample):
        blocks = []
        for i, (before, width) in enumerate(zip([widths[0], *widths], widths)):
            inputs = [before] + [width] * (n - 1)
            block = {"resnets": [resnet_shapes(width_in, width) for width_in in inputs]}
            if i < len(widths) - 1:
                block[resample] = [{"conv": conv_shapes(width, width)}]
            blocks.append(block)
        return blocks

    return {"encoder": {"conv_in": conv_shapes(3, widths[0]),
                        "down_blocks": levels(widths, n, "downsamplers"), "mid_block": middle,
                        "conv_norm_out": norm_shapes(top), "conv_out": conv_shapes(top, 2 * z)},
            "quant_conv": conv_shapes(2 * z, 2 * z, 1), "post_quant_conv": conv_shapes(z, z, 1),
            "decoder": {"conv_in": conv_shapes(z, top), "mid_block": middle,
                        "up_blocks": levels(widths[::-1], n + 1, "upsamplers"),
                        "conv_norm_out": norm_shapes(widths[0]),
                        "conv_out": conv_shapes(widths[0], 3)}}


def depths(config):
    """Return how many blocks the transformers of each level of a U-Net have, from the top."""
    depth = config.transformer_layers_per_block
    return [depth] * len(config.block_out_channels) if isinstance(depth, int) else depth


def unet_shapes(config):
    """Return the shapes of the U-Net with this config.

    Each ResBlock on the way down leaves a skip for the way up, and so does each downsampler. In
    Stable Diffusion 1, with 320, 640, 1280, 1280 channels and 2 ResBlocks a level, the skips have
    320 | 320 320 320 | 640 640 640 | 1280 1280 1280 | 1280 1280 channels, from conv_in on. On the
    way up each level takes 3 from the end: the last level's ResBlocks get 1280 + 1280 channels
    three times, the next one's 1280 + 1280, 1280 + 1280 and 1280 + 640, and so on.
    """
    widths, n = config.block_out_channels, config.layers_per_block
    first, top, temb, depth = widths[0], widths[-1], 4 * widths[0], depths(config)

    def level(inputs, width, kind, depth):
        block = {"resnets": [resnet_shapes(i, width, temb) for i in inputs]}
        if "Attn" in kind:
            transformer = transformer_shapes(width, config.cross_attention_dim, depth)
            block["attentions"] = [transformer] * len(inputs)
        return block

    down, skips, x = [], [first], first
    for i, (width, kind) in enumerate(zip(widths, config.down_block_types)):
        down.append(level([x] + [width] * (n - 1), width, kind, depth[i]))
        skips += [width] * n
        if i < len(widths) - 1:
            down[-1]["downsamplers"] = [{"conv": conv_shapes(width, width)}]
            skips.append(width)
        x = width

    up = []
    for i, (width, kind) in enumerate(zip(reversed(widths), config.up_block_types)):
        skips, used = skips[:-n - 1], skips[-n - 1:][::-1]
        inputs = [before + skip for before, skip in zip([x] + [width] * n, used)]
        up.append(level(inputs, width, kind, depth[-1 - i]))
        if i < len(widths) - 1:
            up[-1]["upsamplers"] = [{"conv": conv_shapes(width, width)}]
        x = width

    shapes = {"time_embedding": {"linear_1": linear_shapes(first, temb),
                                 "linear_2": linear_shapes(temb, temb)},
              "conv_in": conv_shapes(config.in_channels, first), "down_blocks": down,
              "up_blocks": up, "conv_norm_out": norm_shapes(first),
              "conv_out": conv_shapes(first, config.out_channels)}
    if config.time_cond_proj_dim:
        shapes["time_embedding"]["cond_proj"] = bare_shapes(config.time_cond_proj_dim, first)
    if config.addition_time_embed_dim:
        shapes["add_embedding"] = {
            "linear_1": linear_shapes(config.projection_class_embeddings_input_dim, temb),
            "linear_2": linear_shapes(temb, temb)}
    if config.mid_block_type:
        shapes["mid_block"] = {"resnets": [resnet_shapes(top, top, temb)] * 2, "attentions": [
            transformer_shapes(top, config.cross_attention_dim, depth[-1])]}
    return shapes


SHAPES = {"text_encoder": text_shapes, "text_encoder_2": projected_text_shapes, "vae": vae_shapes,
          "unet": unet_shapes}
