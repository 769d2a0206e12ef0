"""The shapes of each network's weights in a checkpoint, to check files and to make new ones.

A name in a file is the path to the array: down_blocks.0.resnets.1.conv1.weight. The functions
return nested shapes; flatten() turns them into {name: shape}.
"""


def layer(*shape):
    """Return the shapes of a norm (n,), linear layer (out, in) or convolution (out, in, h, w)."""
    return {"weight": shape, "bias": shape[:1]}


def bare(*shape):
    """Return the shapes of a layer without bias."""
    return {"weight": shape}


def conv(i, o):
    """Return the shapes of a 3x3 convolution from i to o channels."""
    return layer(o, i, 3, 3)


def resnet_shapes(i, o, temb=None):
    """Return the shapes of a ResBlock; temb: width of the time embedding, None in the VAE."""
    shapes = {"norm1": layer(i), "conv1": conv(i, o), "norm2": layer(o), "conv2": conv(o, o)}
    if temb:
        shapes["time_emb_proj"] = layer(o, temb)
    if i != o:
        shapes["conv_shortcut"] = layer(o, i, 1, 1)
    return shapes


def attention_shapes(width, context, project=bare):
    """Return the shapes of attention: queries of `width` channels, keys and values of context."""
    return {"to_q": project(width, width), "to_k": project(width, context),
            "to_v": project(width, context), "to_out": [layer(width, width)]}


def transformer_shapes(width, context, depth=1):
    """Return the shapes of a transformer of `width` channels and words of `context` numbers.

    depth: its number of blocks.
    """
    feed_forward = [{"proj": layer(8 * width, width)}, None, layer(width, 4 * width)]
    block = {"norm1": layer(width), "attn1": attention_shapes(width, width),
             "norm2": layer(width), "attn2": attention_shapes(width, context),
             "norm3": layer(width), "ff": {"net": feed_forward}}
    return {"norm": layer(width), "proj_in": layer(width, width, 1, 1),
            "transformer_blocks": [block] * depth, "proj_out": layer(width, width, 1, 1)}


def level_shapes(inputs, width, resampler, temb=None, transformer=None):
    """Return the shapes of a level: ResBlocks from these input channels to `width`, and the rest.

    resampler: "downsamplers", "upsamplers", or False on the last level.
    """
    shapes = {"resnets": [resnet_shapes(i, width, temb) for i in inputs]}
    if transformer:
        shapes["attentions"] = [transformer] * len(inputs)
    if resampler:
        shapes[resampler] = [{"conv": conv(width, width)}]
    return shapes


def text_shapes(config):
    """Return the shapes of the text encoder with this config."""
    width, wide = config.hidden_size, config.intermediate_size
    block = {"layer_norm1": layer(width), "layer_norm2": layer(width),
             "self_attn": {f"{name}_proj": layer(width, width) for name in ("q", "k", "v", "out")},
             "mlp": {"fc1": layer(wide, width), "fc2": layer(width, wide)}}
    return {"embeddings": {"token_embedding": bare(config.vocab_size, width),
                           "position_embedding": bare(config.max_position_embeddings, width)},
            "encoder": {"layers": [block] * config.num_hidden_layers},
            "final_layer_norm": layer(width)}


def vae_shapes(config):
    """Return the shapes of the VAE with this config."""
    widths, n, z = config.block_out_channels, config.layers_per_block, config.latent_channels
    top = widths[-1]
    middle = {"resnets": [resnet_shapes(top, top)] * 2, "attentions": [
        {"group_norm": layer(top), **attention_shapes(top, top, layer)}]}

    def levels(widths, n, resampler):
        return [level_shapes([before] + [width] * (n - 1), width, i < len(widths) and resampler)
                for i, (before, width) in enumerate(zip([widths[0], *widths], widths), 1)]

    return {"encoder": {"conv_in": conv(3, widths[0]),
                        "down_blocks": levels(widths, n, "downsamplers"), "mid_block": middle,
                        "conv_norm_out": layer(top), "conv_out": conv(top, 2 * z)},
            "quant_conv": layer(2 * z, 2 * z, 1, 1), "post_quant_conv": layer(z, z, 1, 1),
            "decoder": {"conv_in": conv(z, top), "mid_block": middle,
                        "up_blocks": levels(widths[::-1], n + 1, "upsamplers"),
                        "conv_norm_out": layer(widths[0]), "conv_out": conv(widths[0], 3)}}


def depths(config):
    """Return how many blocks the transformers of each level of a U-Net have, from the top."""
    depth = config.transformer_layers_per_block
    return [depth] * len(config.block_out_channels) if isinstance(depth, int) else depth


def unet_shapes(config):
    """Return the shapes of the U-Net with this config.

    Each ResBlock and each downsampler on the way down leaves a skip for the way up. In Stable
    Diffusion 1, with 320, 640, 1280, 1280 channels and 2 ResBlocks per level, the skips have
    320 | 320 320 320 | 640 640 640 | 1280 1280 1280 | 1280 1280 channels, from conv_in on. On the
    way up each level takes 3 from the end: the last level's ResBlocks get 1280 + 1280 channels
    three times, the next one's 1280 + 1280, 1280 + 1280 and 1280 + 640, and so on.
    """
    widths, n = config.block_out_channels, config.layers_per_block
    first, top, temb, depth = widths[0], widths[-1], 4 * widths[0], depths(config)

    def level(inputs, width, kind, depth, resampler):
        transformer = "Attn" in kind and transformer_shapes(
            width, config.cross_attention_dim, depth)
        return level_shapes(inputs, width, resampler, temb, transformer)

    down, skips, x = [], [first], first
    for i, (width, kind) in enumerate(zip(widths, config.down_block_types)):
        halves = i < len(widths) - 1
        down.append(level([x] + [width] * (n - 1), width, kind, depth[i],
                          halves and "downsamplers"))
        skips += [width] * (n + halves)
        x = width

    up = []
    for i, (width, kind) in enumerate(zip(reversed(widths), config.up_block_types)):
        skips, used = skips[:-n - 1], skips[-n - 1:][::-1]
        inputs = [before + skip for before, skip in zip([x] + [width] * n, used)]
        up.append(level(inputs, width, kind, depth[-1 - i], i < len(widths) - 1 and "upsamplers"))
        x = width

    shapes = {"time_embedding": {"linear_1": layer(temb, first), "linear_2": layer(temb, temb)},
              "conv_in": conv(config.in_channels, first), "down_blocks": down, "up_blocks": up,
              "conv_norm_out": layer(first), "conv_out": conv(first, config.out_channels)}
    if config.time_cond_proj_dim:
        shapes["time_embedding"]["cond_proj"] = bare(first, config.time_cond_proj_dim)
    if config.addition_time_embed_dim:
        shapes["add_embedding"] = {
            "linear_1": layer(temb, config.projection_class_embeddings_input_dim),
            "linear_2": layer(temb, temb)}
    if config.mid_block_type:
        shapes["mid_block"] = {"resnets": [resnet_shapes(top, top, temb)] * 2, "attentions": [
            transformer_shapes(top, config.cross_attention_dim, depth[-1])]}
    return shapes


SHAPES = {
    "text_encoder": text_shapes, "vae": vae_shapes, "unet": unet_shapes,
    "text_encoder_2": lambda config: text_shapes(config) | {    # it ends with a projection
        "text_projection": bare(config.projection_dim, config.hidden_size)}}
