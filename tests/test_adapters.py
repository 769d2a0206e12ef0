"""Adapters of every kind and in every file format act on weights as in lycoris-lora and peft."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tiny_sd
from conftest import record
from extras import adapters, cli, formats, named, prompts
from helpers import TWO_ENCODERS, write_model

pytestmark = pytest.mark.slow

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV, POINT = "down_blocks.0.resnets.0.conv1", "down_blocks.0.attentions.0.proj_in"
NORM, TEXT = "down_blocks.0.resnets.0.norm1", "encoder.layers.1.mlp.fc1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("adapted") / "model", TWO_ENCODERS)


@pytest.fixture(scope="module")
def plain(folder):
    """{part: {name: tensor}} of the model, as in its files."""
    _, arrays, *_ = formats.read(folder)
    return {part: {name: torch.from_numpy(np.array(array)) for name, array in of.items()}
            for part, of in arrays.items()}


def adapted(folder, path, weight=1.0):
    """Return {part: {name: array}} of the model with an adapter, and the words in it."""
    _, arrays, *_ = formats.read(folder)
    words = adapters.add_adapters(arrays, [(path, weight)])
    return arrays, words


def layer(plain, name, part="unet"):
    """Return the torch module with the model's weights."""
    weight, bias = plain[part][f"{name}.weight"], plain[part].get(f"{name}.bias")
    if weight.ndim == 1:
        module = torch.nn.GroupNorm(1, len(weight))
    elif weight.ndim == 2:
        module = torch.nn.Linear(*weight.shape[::-1], bias=bias is not None)
    else:
        o, i, k, _ = weight.shape
        module = torch.nn.Conv2d(i, o, k, padding=k // 2, bias=bias is not None)
    module.weight.data = weight.clone()
    if bias is not None:
        module.bias.data = bias.clone()
    return module


def randomised(module, seed=0):
    """Return the module with random numbers in its trainable parameters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "org" not in name and "dora" not in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 3
    return module


def saved(path, tensors, metadata=None):
    save_file({name: torch.as_tensor(array).detach().contiguous().clone()
               for name, array in tensors.items()}, path, metadata)
    return path


def close(what, ours, theirs, before):
    """The adapter changes the weight, and as the reference does."""
    theirs = np.asarray(theirs.detach()).reshape(ours.shape)
    error = np.abs(ours - theirs).max()
    record(f"weights with {what}", error)
    assert error < 2e-6 * max(1, np.abs(theirs).max())
    assert np.abs(theirs - np.asarray(before).reshape(ours.shape)).max() > 1e-3


# ── LyCORIS ─────────────────────────────────────────────────────────────────────────────────────

ALGORITHMS = {      # name: (class, arguments)
    "LoRA": ("locon.LoConModule", {}), "LoCon": ("locon.LoConModule", {"use_tucker": True}),
    "rsLoRA": ("locon.LoConModule", {"rs_lora": True}),
    "LoHa": ("loha.LohaModule", {}), "LoHa, Tucker": ("loha.LohaModule", {"use_tucker": True}),
    "LoKr": ("lokr.LokrModule", {"factor": 2}), "LoKr, small": ("lokr.LokrModule", {"lora_dim": 1}),
    "LoKr, Tucker": ("lokr.LokrModule", {"use_tucker": True, "lora_dim": 1}),
    "LoKr, all products": ("lokr.LokrModule", {"decompose_both": True, "lora_dim": 1}),
    "LoKr, whole": ("lokr.LokrModule", {"full_matrix": True}),
    "full": ("full.FullModule", {}), "IA3": ("ia3.IA3Module", {}),
    "IA3 of the input": ("ia3.IA3Module", {"train_on_input": True})}


def lycoris(name, org, **more):
    """Return a module of lycoris-lora for a layer."""
    import importlib
    kind, arguments = ALGORITHMS[name]
    file, kind = kind.split(".")
    kind = getattr(importlib.import_module(f"lycoris.modules.{file}"), kind)
    return randomised(kind("x", org, **{"lora_dim": 3, "alpha": 2} | arguments | more))


def state(module):
    return {name: array for name, array in (
        module.custom_state_dict() or module.state_dict()).items() if array is not None}


@pytest.mark.parametrize("where", [LINEAR, CONV, POINT])
@pytest.mark.parametrize("name", ALGORITHMS)
@torch.no_grad()
def test_lycoris(name, where, folder, plain, tmp_path):
    module = lycoris(name, layer(plain, where))
    prefix = f"lora_unet_{where.replace('.', '_')}"
    tensors = {"diff": module.weight} if name == "full" else state(module)
    path = saved(tmp_path / "a.safetensors",
                 {f"{prefix}.{key}": array for key, array in tensors.items()})
    before = plain["unet"][f"{where}.weight"]
    for weight in 1.0, -0.6:
        delta = module.get_diff_weight(weight)[0]
        if name.startswith(("LoHa", "LoKr")):
            delta = delta / module.scale    # it multiplies twice here, and once in its layers
        ours, _ = adapted(folder, path, weight)
        close(name, ours["unet"][f"{where}.weight"], before + delta.reshape(before.shape), before)


@pytest.mark.parametrize("where", [LINEAR, CONV])
@pytest.mark.parametrize("on_out", [True, False])
@pytest.mark.parametrize("name", ["LoRA", "LoHa", "LoKr", "LoCon"])
@torch.no_grad()
def test_dora_of_lycoris(name, on_out, where, folder, plain, tmp_path):
    more = {"alpha": 3} if name in ("LoHa", "LoKr") else {}      # a scale of 1: see above
    module = lycoris(name, layer(plain, where), weight_decompose=True, wd_on_out=on_out, **more)
    module.dora_scale.mul_(1.5)
    path = saved(tmp_path / "a.safetensors", {
        f"lycoris_{where.replace('.', '_')}.{key}": array for key, array in state(module).items()})
    ours, _ = adapted(folder, path)
    before = plain["unet"][f"{where}.weight"]
    theirs, _ = module.get_merged_weight(shape=before.shape)
    close(f"{name} and DoRA", ours["unet"][f"{where}.weight"], theirs, before)


@torch.no_grad()
def test_differences_of_norms_and_biases(folder, plain, tmp_path):
    from lycoris.modules.norms import NormModule
    norm, bias = randomised(NormModule("x", layer(plain, NORM))), torch.randn(8)
    prefix = f"lora_unet_{NORM.replace('.', '_')}"
    path = saved(tmp_path / "a.safetensors", {
        f"{prefix}.w_norm": norm.w_norm, f"{prefix}.b_norm": norm.b_norm,
        f"diffusion_model.{CONV}.diff_b": bias})
    ours, _ = adapted(folder, path, 0.5)
    weights = norm.get_merged_weight(0.5)
    for name, theirs in zip(("weight", "bias"), weights):
        close("norms", ours["unet"][f"{NORM}.{name}"], theirs, plain["unet"][f"{NORM}.{name}"])
    before = plain["unet"][f"{CONV}.bias"]
    close("biases", ours["unet"][f"{CONV}.bias"], before + 0.5 * bias, before)


# ── peft ────────────────────────────────────────────────────────────────────────────────────────


class Net(torch.nn.Module):
    """Two layers of the model, under their names."""

    def __init__(self, plain):
        super().__init__()
        for name in LINEAR, CONV:
            parent = self
            *path, last = name.split(".")
            for piece in path:
                if not hasattr(parent, piece):
                    parent.add_module(piece, torch.nn.Module())
                parent = getattr(parent, piece)
            parent.add_module(last, layer(plain, name))


FACTS = {
    "plain": {"r": 3, "lora_alpha": 5}, "rsLoRA": {"r": 3, "lora_alpha": 5, "use_rslora": True},
    "patterns": {"r": 2, "lora_alpha": 5,       # ^ is where a name begins
                 "alpha_pattern": {"^attn1.to_q": 9, "attn1.to_q": 7},
                 "rank_pattern": {"^" + CONV.replace(".", r"\."): 4}},
    "DoRA": {"r": 3, "lora_alpha": 5, "use_dora": True},
    "with biases": {"r": 3, "lora_alpha": 5, "lora_bias": True, "target_modules": ["conv1"]},
    "PiSSA": {"r": 3, "lora_alpha": 5, "init_lora_weights": "pissa", "target_modules": ["to_q"]},
    "LoHa": {"r": 3, "alpha": 5}, "LoKr": {"r": 1, "alpha": 5},
    "LoKr, whole": {"r": 16, "alpha": 5}}


@pytest.mark.parametrize("form", ["beside", "header", "header of a part"])
@pytest.mark.parametrize("name", FACTS)
@torch.no_grad()
def test_peft(name, form, folder, plain, tmp_path):
    """alpha, ranks and scales, which peft keeps apart from the tensors."""
    import peft
    kind = {"LoHa": peft.LoHaConfig, "LoKr": peft.LoKrConfig}.get(name[:4], peft.LoraConfig)
    config = kind(**{"target_modules": ["to_q", "conv1"]} | FACTS[name])
    net = peft.get_peft_model(Net(plain), config)
    for parameter_name, parameter in net.named_parameters():
        if re.search(r"lora_[AB]|hada|lokr", parameter_name):
            parameter.data += torch.randn(parameter.shape) / 3
        elif "magnitude" in parameter_name:
            parameter.data *= 1.5
    net.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    if form != "beside":
        from safetensors.torch import load_file
        start = "unet." if "part" in form else ""
        facts = json.loads((tmp_path / "adapter_config.json").read_text())
        path = saved(tmp_path / "a.safetensors", {
            key.replace("base_model.model.", start): array
            for key, array in load_file(path).items()},
            {"lora_adapter_metadata": json.dumps({f"{start}{key}": facts[key] for key in facts})})

    ours, _ = adapted(folder, path, 0.7)
    for module in net.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.7)
    merged = net.merge_and_unload()
    for where in LINEAR, CONV:
        for what in ["weight", *["bias"] * (name == "with biases" and where == CONV)]:
            before = plain["unet"][f"{where}.{what}"]
            theirs = merged.get_submodule(where).state_dict()[what]
            if (where == LINEAR) == ("conv1" in config.target_modules and name ==
                                     "with biases") or name == "PiSSA" and where == CONV:
                continue
            close(f"peft, {name}", ours["unet"][f"{where}.{what}"], theirs, before)


@pytest.mark.parametrize("facts, named", [
    ({"fan_in_fan_out": True}, "fan_in_fan_out"), ({"layer_replication": [[0, 4]]}, "replication"),
    ({"init_lora_weights": "olora"}, "olora"), ({"alpha_pattern": {"(a+)+$": 3}}, "(a+)+"),
    ({"alpha_pattern": 3}, "alpha"), ({"lora_alpha": "x"}, LINEAR), ({"modules_to_save": ["a"]},
                                                                    "modules_to_save")])
def test_facts_of_peft_that_are_not_known_are_refused(facts, named, folder, tmp_path):
    path = saved(tmp_path / "a.safetensors", lora(LINEAR, "unet."),
                 {"lora_adapter_metadata": json.dumps(facts)})
    with pytest.raises(tiny_sd.UserError, match=re.escape(named)):
        adapted(folder, path)


def test_shapes_that_only_broadcast_are_refused(folder, tmp_path):
    """A column and a row of 160 kB would make gigabytes."""
    a, b = torch.zeros(40_000, 1), torch.zeros(1, 1)
    tensors = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": b, "hada_w2_b": a.T}
    path = saved(tmp_path / "a.safetensors", {
        f"lora_unet_{LINEAR.replace('.', '_')}.{name}": p for name, p in tensors.items()})
    with pytest.raises(tiny_sd.UserError, match="its LoHa's shapes are"):
        adapted(folder, path)


def test_a_scale_of_a_single_number(folder, tmp_path):
    path = saved(tmp_path / "a.safetensors", {"a.weight": torch.tensor(1.0),
                                              "a.scale_weight": torch.tensor(1.0)})
    with pytest.raises(tiny_sd.UserError, match="has nothing for a.weight"):
        adapted(folder, path)


@pytest.mark.parametrize("name", ["a." * 20_000 + "lora_up.weight", "_lora_" * 8000 + "-"])
def test_an_endless_name_is_refused_at_once(name, folder, tmp_path):
    """Files of 50 kB kept it busy for minutes; torch's files have such names, too."""
    path = saved(tmp_path / "a.safetensors", {name: torch.zeros(1)})
    with pytest.raises(tiny_sd.UserError, match="a tensor's name of more than 300 characters"):
        adapted(folder, path)
    assert named.may_be_model(path)
    torch.save({name: torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(tiny_sd.UserError, match="has no named tensors"):
        adapted(folder, tmp_path / "a.pt")


def test_many_patterns_and_many_unknown_names_are_refused_at_once(folder, tmp_path):
    facts = {"alpha_pattern": {f"k{i}": 1 for i in range(200_000)}}
    path = saved(tmp_path / "a.safetensors", lora(LINEAR, "unet."),
                 {"lora_adapter_metadata": json.dumps(facts)})
    with pytest.raises(tiny_sd.UserError, match="alpha_pattern is not an object of at most 2000"):
        adapted(folder, path)
    many = {f"{i}.{'a.' * 100}weight": torch.zeros(1) for i in range(20_000)}
    with pytest.raises(tiny_sd.UserError, match="and 96 more"):
        adapted(folder, saved(tmp_path / "b.safetensors", many))


def test_every_field_of_pefts_config_is_known():
    """Settings are followed, refused, or have no effect on the weights.

    Biases, and parameters that are not a layer's weight, are in the file and refused by name.
    """
    import dataclasses

    import peft
    known = {*adapters.FIXED, "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora",
             "init_lora_weights"}
    idle = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path",
            "revision", "inference_mode", "target_modules", "exclude_modules", "target_parameters",
            "layers_to_transform", "layers_pattern", "lora_dropout", "bias", "lora_bias",
            "use_dora", "megatron_config", "megatron_core", "loftq_config", "eva_config",
            "lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying"}
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= known | idle


# ── Names ───────────────────────────────────────────────────────────────────────────────────────


def lora(where, start="lora_unet_", names=("lora_down.weight", "lora_up.weight"), inputs=8,
         outputs=8, seed=0):
    torch.manual_seed(seed)
    where = where.replace(".", "_") if start.endswith("_") else where
    return {f"{start}{where}.{names[0]}": torch.randn(3, inputs),
            f"{start}{where}.{names[1]}": torch.randn(outputs, 3)}


@pytest.mark.parametrize("start", [
    "lora_unet_", "lycoris_", "diffusion_model.", "model.diffusion_model.", "unet.", "lora_unet.",
    "base_model.model.", "base_model.model.unet.", ""])
@pytest.mark.parametrize("names", [
    ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight"),
    ("lora.down.weight", "lora.up.weight"), ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora_A.default_0.weight", "lora_B.default_0.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")])
def test_one_lora_in_every_form_is_one(start, names, folder, plain, tmp_path):
    tensors = lora(LINEAR, start, names)
    ours, _ = adapted(folder, saved(tmp_path / "a.safetensors", tensors), 0.5)
    a, b = tensors.values()
    before = plain["unet"][f"{LINEAR}.weight"]
    close("LoRAs in every form", ours["unet"][f"{LINEAR}.weight"], before + 0.5 * b @ a, before)


@pytest.mark.parametrize("start, part", [
    ("lora_te_text_model_", "text_encoder"), ("lora_te1_text_model_", "text_encoder"),
    ("lora_te2_text_model_", "text_encoder_2"), ("text_encoder.", "text_encoder"),
    ("text_encoder.text_model.", "text_encoder"), ("text_encoder_2.text_model.", "text_encoder_2"),
    ("text_encoders.clip_l.transformer.text_model.", "text_encoder"),
    ("text_encoders.clip_g.transformer.text_model.", "text_encoder_2"),
    ("clip_g.transformer.text_model.", "text_encoder_2"),
    ("base_model.model.text_model.", "text_encoder")])
def test_the_text_encoders_in_every_form(start, part, folder, plain, tmp_path):
    o, i = plain[part][f"{TEXT}.weight"].shape
    tensors = lora(TEXT, start, inputs=i, outputs=o)
    ours, _ = adapted(folder, saved(tmp_path / "a.safetensors", tensors))
    a, b = tensors.values()
    before = plain[part][f"{TEXT}.weight"]
    close("LoRAs of text encoders", ours[part][f"{TEXT}.weight"], before + b @ a, before)


# ── Layers by number ────────────────────────────────────────────────────────────────────────────


def walk(network, targets):
    """Yield the linear layers inside of the network's modules of these classes, in order.

    That is how cloneofsimo's lora_diffusion counts them.
    """
    for outer in network.modules():
        if type(outer).__name__ in targets:
            yield from (inner for inner in outer.modules() if isinstance(inner, torch.nn.Linear))


@pytest.mark.parametrize("version, form", [("older", ".safetensors"), ("today's", ".pt"),
                                           ("no gate", ".safetensors")])
@torch.no_grad()
def test_layers_by_number(version, form, reference, tmp_path):
    """In the order of the modules in diffusers and transformers, which older versions change."""
    targets = {"unet": {"Attention", "GEGLU"}, "text_encoder": {"CLIPAttention"}}
    networks = {part: copy.deepcopy(getattr(reference, part)) for part in targets}
    for block in networks["unet"].modules():
        if version == "older" and hasattr(block, "attn2"):
            block._modules["attn2"] = block._modules.pop("attn2")       # now behind the gate
    targets["unet"] -= {"GEGLU"} if version == "no gate" else set()
    tensors = {}
    for part, network in networks.items():
        for i, module in enumerate(walk(network, targets[part])):
            o, n = module.weight.shape
            up, down = torch.randn(o, 2), torch.randn(2, n) / 2
            tensors |= {f"{part}:{i}:up": up, f"{part}:{i}:down": down}
            module.weight += 0.5 * up @ down
    files = [tmp_path / "a.safetensors"]
    if form == ".pt":
        files = [tmp_path / "a.pt", tmp_path / "a.text_encoder.pt"]
        for file, part in zip(files, networks):
            torch.save([torch.nn.Parameter(array) for name, array in tensors.items()
                        if name.startswith(part)], file)
    else:
        saved(files[0], tensors)
    reference.save_pretrained(tmp_path / "model")
    _, ours, *_ = formats.read(tmp_path / "model")
    adapters.add_adapters(ours, [(file, 0.5) for file in files])
    for part, network in networks.items():
        for name, array in network.state_dict().items():
            name = tiny_sd.current_name(name)
            if name in ours[part]:
                error = np.abs(tiny_sd.widen(ours[part][name]) - np.asarray(array)).max()
                assert error < 1e-5, name


def test_the_words_among_numbered_layers(folder, tmp_path):
    """A learnt token, between < and >, is a word of prompts."""
    _, arrays, *_ = formats.read(folder)
    order = next(adapters.orders("text_encoder", arrays["text_encoder"]))
    tensors = {f"text_encoder:{i}:{side}": torch.ones(shape) for i in range(len(order))
               for side, shape in (("up", (12, 1)), ("down", (1, 12)))}
    path = saved(tmp_path / "a.safetensors", tensors | {"<s1>": torch.randn(12)},
                 {"<s1>": "<embed>"})
    assert adapted(folder, path)[1].keys() == {"<s1>"}
    saved(path, tensors | {"<s1>": torch.randn(9), "<s2>": torch.randn(9)})
    with pytest.raises(tiny_sd.UserError, match="^<s1> is for another model: .* have 9 numbers"):
        prompts.with_embeddings(formats.load(write_model(tmp_path / "m")),
                                adapted(folder, path)[1].items())
    for extra in ("text_encoder:0:up", "text_encoder:99:up"):       # a vector is no matrix
        saved(path, tensors | {extra: torch.ones(12)})
        with pytest.raises(tiny_sd.UserError, match="does not fit the model: it numbers"):
            adapted(folder, path)


# ── What is none ────────────────────────────────────────────────────────────────────────────────

PREFIX = f"lora_unet_{LINEAR.replace('.', '_')}"


@pytest.mark.parametrize("tensors, named", [
    ({f"{PREFIX}.alpha": torch.tensor(3.0)}, "nothing to scale"),
    ({f"{PREFIX}.lora_down.weight": torch.zeros(3, 8)}, "it has no 'up'"),
    ({f"{PREFIX}.hada_w1_a": torch.zeros(8, 3)}, "hada_w1_b"),
    ({f"{PREFIX}.lora_down.weight": torch.zeros(0, 8),
      f"{PREFIX}.lora_up.weight": torch.zeros(8, 0)}, "rank is 0"),
    ({f"{PREFIX}.oft_blocks": torch.zeros(2, 4, 4)}, "unknown kind of adapter: .*oft_blocks"),
    ({f"{PREFIX}.a1.weight": torch.zeros(2, 4)}, "unknown kind of adapter: .*a1.weight"),
    ({f"{PREFIX}.lokr_w1": torch.zeros(40_000, 1), f"{PREFIX}.lokr_w2": torch.zeros(40_000, 1)},
     "its product has 1600000000 numbers"),
    ({f"{PREFIX}.lora_down.weight": torch.zeros(1, 40_000),
      f"{PREFIX}.lora_up.weight": torch.zeros(40_000, 1)}, "its product has"),
    ({"unet:0:up": torch.zeros(8, 4), "unet:0:down": torch.zeros(4, 8)},
     "numbers 1 layers of the unet, but their shapes are not those"),
    ({"unet:0:up": torch.zeros(8)}, "their shapes are not those"),
    ({"unet:00:up": torch.zeros(8, 4)}, "nothing for unet:00:up"),
    ({f"unet:{i}:down": torch.zeros(4, 8) for i in range(16)}, "their shapes are not those"),
    ({"lora_unet_no_such.lora_up.weight": torch.zeros(2, 4)}, "does not fit the model"),
    ({"emb_params": torch.zeros(2, 12)}, "is an embedding: --embedding, not a LoRA"),
    ({"<cat-toy>": torch.zeros(12)}, "is an embedding: --embedding"),
    ({"clip_l": torch.zeros(1, 12), "clip_g": torch.zeros(1, 16)}, "an embedding: --embedding"),
    ({"decoder.conv_in.weight": torch.zeros(2)}, "a VAE: --vae, not a LoRA"),
    ({"model.diffusion_model.out.2.bias": torch.zeros(4)}, "a whole model: --model"),
    ({"control_model.out.2.bias": torch.zeros(4)}, "a ControlNet"),
    ({f"{PREFIX}.lora_down.weight": torch.full((1, 8), 1e30),
      f"{PREFIX}.lora_up.weight": torch.full((8, 1), 1e30)}, "not finite"),
    ({"lora_te_text_model_final_layer_norm.dora_scale": torch.zeros(3)}, "nothing to scale")])
def test_what_is_none_is_told_in_one_line(tensors, named, folder, tmp_path, capsys):
    path = saved(tmp_path / "a.safetensors", tensors)
    assert cli.main(["cat", "-m", str(folder), "--steps", "1", "--lora", str(path)]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and not out and re.search(named, err), err


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("weight", [1e308, -1e40])
def test_a_weight_beyond_all_is_told_as_such(weight, folder, tmp_path):
    path = saved(tmp_path / "a.safetensors", lora(LINEAR))
    with pytest.raises(tiny_sd.UserError, match=f"with weight {re.escape(str(weight))} the result"):
        formats.load(folder, loras=[(path, weight)])


def test_an_embedding_inside_is_a_word_of_prompts(folder, tmp_path):
    """As that embedding's own file, under its name."""
    vectors = {"clip_l": torch.randn(2, 12), "clip_g": torch.randn(2, 16)}
    inside = {f"bundle_emb.red.{name}": array for name, array in vectors.items()}
    path = saved(tmp_path / "a.safetensors", lora(LINEAR) | inside)
    bundled = formats.load(folder, loras=[(path, 1.0)])
    alone = prompts.with_embeddings(formats.load(folder), [
        saved(tmp_path / "red.safetensors", vectors)])
    for ours, theirs in zip(bundled.encoders, alone.encoders):
        ids = ours.tokenizer.encode("red apple")[0]
        assert np.array_equal(ids, theirs.tokenizer.encode("red apple")[0])
        first = len(ours.tokenizer.vocab)
        assert {first, first + 1} <= {*ids.tolist()}
    ours, theirs = (tiny_sd.embed_prompts(model, ["red apple"]) for model in (bundled, alone))
    assert all(map(np.array_equal, ours, theirs))
