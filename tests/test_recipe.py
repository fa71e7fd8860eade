"""What a recipe accepts, and what it says when it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qaft.cli import overrides_from
from qaft.compat import INCOMPATIBLE, cautions
from qaft.errors import IncompatibleError, RecipeError
from qaft.recipe import apply_overrides, load_recipe, parse_override, parse_recipe, save_recipe

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
MINIMAL = {"model": {"name": "m"}}


def recipe(**sections):
    return parse_recipe({**MINIMAL, **sections})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    assert load_recipe(path).model.name


def test_the_interface_of_the_readme_is_accepted() -> None:
    text = """
model:    {name: PATH_OR_ID, storage: int4, dtype: bfloat16}
select:   {kind: patterns, targets: [q_proj, v_proj]}
update:   {kind: dense}
qat:      {weights: {bits: 4, group_size: 128, symmetric: true}, rotation: hadamard}
gradient: {kind: backprop}
regularize: []
optim:    {name: adamw, lr: 1.0e-4, weight_decay: 0.0, lr_scale: {v_proj: 1}}
data:     {train: train.jsonl, valid: valid.jsonl, format: auto, max_length: 512, packing: true}
train:    {steps: 200, batch_size: 8, grad_accumulation: 1, seed: 0, eval_every: 50, save_every: 100, resume: false, output: runs/name}
export:   [{format: merged}, {format: compressed-tensors}]
"""
    assert parse_recipe(yaml.safe_load(text)).qat.weights.group_size == 128


@pytest.mark.parametrize(
    ("raw", "fragments"),
    [
        ({"modle": {}}, ["modle is not a key", "did you mean 'model'?"]),
        ({"model": {"name": "m", "storag": "int4"}}, ["model.storag", "did you mean 'storage'?"]),
        ({"model": {"name": "m", "storage": "int5"}}, ["model.storage='int5'", "nf4"]),
        ({**MINIMAL, "train": {"steps": 0}}, ["train.steps=0", "greater than or equal to 1"]),
        ({**MINIMAL, "train": {"steps": "many"}}, ["train.steps='many'", "integer"]),
        ({**MINIMAL, "qat": {"weights": {"bits": 9}}}, ["qat.weights.bits=9"]),
        ({**MINIMAL, "qat": {"weights": {"group_size": 3}}}, ["group_size=3"]),
        ({**MINIMAL, "qat": {"weights": {"kind": "mxfp4", "group_size": 16}}}, ["group_size=16 must be 32", "mxfp4"]),
        ({**MINIMAL, "qat": {"weights": {"kind": "nf4", "bits": 3}}}, ["bits=3 must be 4 for kind nf4"]),
        ({**MINIMAL, "qat": {"weights": {"kind": "q4_0", "range": "mse"}}}, ["range=mse must be absmax for kind q4_0"]),
        ({**MINIMAL, "qat": {"weights": {"kind": "nf4", "symmetric": False}}}, ["symmetric=False must be True"]),
        ({**MINIMAL, "qat": {"weights": {"range": "rms", "clip": 0.9}}}, ["clip=0.9 applies to range absmax"]),
        ({**MINIMAL, "qat": {"weights": {"range": "rms", "symmetric": False}}}, ["range=rms is for symmetric grids"]),
        ({**MINIMAL, "qat": {"weights": {"ste": "none"}}}, ["qat.weights.ste='none'", "clamp"]),
        ({**MINIMAL, "qat": {"activations": {"bits": 6}}}, ["qat.activations.bits=6", "4 or 8"]),
        (
            {**MINIMAL, "qat": {"activations": {"function": "compressed-tensors", "clip": 0.95}}},
            ["function=compressed-tensors is symmetric and does not clip", "clip=0.95"],
        ),
        ({**MINIMAL, "qat": {"kv_cache": {"bits": 8}}}, ["bits=8 must be 4 for function vllm", "roste"]),
        ({**MINIMAL, "qat": {"kv_cache": {"clip": 0.95}}}, ["clip=0.95 must be 1 for function vllm"]),
        ({}, ["model is required"]),
        ([], ["must be a mapping"]),
    ],
)
def test_mistakes_are_named_with_place_value_and_what_is_allowed(raw, fragments) -> None:
    with pytest.raises(RecipeError) as error:
        parse_recipe(raw)
    for fragment in fragments:
        assert fragment in str(error.value)
    assert error.value.exit_code == 2


OPTIONS = {"prompt": "{text}", "verbalizers": {"0": " a", "1": " b"}, "loss": "options"}

ROWS = {
    "model.adapter x update other than lowrank": {
        "model": {"name": "m", "adapter": "a"},
        "update": {"kind": "dense"},
    },
    "model.adapter x zeroth-order source": {
        "model": {"name": "m", "adapter": "a"},
        "gradient": {"kind": "spsa"},
    },
    "no qat x bnb export": {"model": {"name": "m", "storage": "nf4"}, "export": [{"format": "bnb"}]},
    "grid that bitsandbytes lacks x bnb export": {
        "qat": {"weights": {"bits": 8, "group_size": 128}},
        "export": [{"format": "bnb"}],
    },
    "frozen layers of another width x bnb export": {
        "model": {"name": "m", "storage": "int8"},
        "qat": {"weights": {"kind": "nf4"}},
        "export": [{"format": "bnb"}],
    },
    "no qat x gptq export": {"model": {"name": "m", "storage": "int4"}, "export": [{"format": "gptq"}]},
    "grid without 4- or 8-bit integers x gptq export": {
        "qat": {"weights": {"bits": 3}},
        "export": [{"format": "gptq"}],
    },
    "frozen layers on another grid x gptq export": {
        "model": {"name": "m", "storage": "int8_group"},
        "qat": {"weights": {"bits": 4}},
        "export": [{"format": "gptq"}],
    },
    "scales in fp32 x gptq export": {
        "model": {"name": "m", "dtype": "float32"},
        "qat": {"weights": {"bits": 4}},
        "export": [{"format": "gptq"}],
    },
    "grid without a type x gguf export": {"qat": {"weights": {"kind": "nf4"}}, "export": [{"format": "gguf"}]},
    "zero points x gguf export": {
        "qat": {"weights": {"symmetric": False, "group_size": 32}},
        "export": [{"format": "gguf"}],
    },
    "groups that blocks do not fill x gguf export": {
        "qat": {"weights": {"group_size": 48}},
        "export": [{"format": "gguf"}],
    },
    "scales in fp32 x gguf export": {
        "model": {"name": "m", "dtype": "float32"},
        "qat": {"weights": {"group_size": 32}},
        "export": [{"format": "gguf"}],
    },
    "bitsandbytes storage x compressed-tensors export": {
        "model": {"name": "m", "storage": "nf4"},
        "export": [{"format": "compressed-tensors"}],
    },
    "adapter on a packed base x compressed-tensors export": {
        "model": {"name": "m", "storage": "int4"},
        "export": [{"format": "compressed-tensors"}],
    },
    "grid other than int x compressed-tensors export": {
        "qat": {"weights": {"kind": "nf4"}},
        "export": [{"format": "compressed-tensors"}],
    },
    "asymmetric or clipped activations x compressed-tensors export": {
        "qat": {"activations": {"bits": 8, "clip": 0.95}},
        "export": [{"format": "compressed-tensors"}],
    },
    "activations beside zero points x compressed-tensors export": {
        "qat": {"weights": {"symmetric": False}, "activations": {"bits": 8}},
        "export": [{"format": "compressed-tensors"}],
    },
    "activations of compressed-tensors x vllm target": {
        "qat": {"target": "vllm", "activations": {"bits": 8, "function": "compressed-tensors"}},
    },
    "unpackable bit width x compressed-tensors export": {
        "qat": {"weights": {"bits": 3}},
        "export": [{"format": "compressed-tensors"}],
    },
    "two grids with zero points x compressed-tensors export": {
        "model": {"name": "m", "storage": "int8_group"},
        "qat": {"weights": {"bits": 4, "symmetric": False}},
        "export": [{"format": "compressed-tensors"}],
    },
    "int4 storage x grid without integers": {
        "model": {"name": "m", "storage": "int4"},
        "qat": {"weights": {"kind": "nf4"}},
    },
    "int4 storage x another bit width": {"model": {"name": "m", "storage": "int4"}, "qat": {"weights": {"bits": 3}}},
    "reselect_every x rotation other than adaptive": {"qat": {"reselect_every": 2}},
    "reselect_every x update other than dense": {
        "qat": {"rotation": "adaptive", "reselect_every": 2},
        "update": {"kind": "lowrank"},
    },
    "reselect_every x zeroth-order source": {
        "qat": {"rotation": "adaptive", "reselect_every": 2},
        "update": {"kind": "dense"},
        "gradient": {"kind": "spsa"},
    },
    "reselect_every x packed or factored optimizer state": {
        "qat": {"rotation": "adaptive", "reselect_every": 2},
        "update": {"kind": "dense"},
        "optim": {"name": "adafactor"},
    },
    "reselect_every x ZeRO 1 to 3": {
        "qat": {"rotation": "adaptive", "reselect_every": 2},
        "update": {"kind": "dense"},
        "train": {"deepspeed": "zero2"},
    },
    "reselect_every x proximal": {
        "qat": {"rotation": "adaptive", "reselect_every": 2},
        "update": {"kind": "dense"},
        "regularize": [{"kind": "proximal"}],
    },
    "zeroth-order source x ZeRO 1 to 3": {"gradient": {"kind": "lozo"}, "train": {"deepspeed": "zero3"}},
    "lozo x update other than bank": {"gradient": {"kind": "lozo_m"}, "update": {"kind": "lowrank"}},
    "growing LOZO x too few blocks": {
        "gradient": {"kind": "lozo", "policy": "growing", "interval": 10},
        "update": {"kind": "bank", "blocks": 9},
        "train": {"steps": 91},
    },
    "zeroth-order source x regularize": {"gradient": {"kind": "spsa"}, "regularize": [{"kind": "proximal"}]},
    "optimizer that is not element by element x ZeRO 1 to 3": {
        "optim": {"name": "adafactor"},
        "train": {"deepspeed": "zero1"},
    },
    "multiplicative rule x updates": {"optim": {"name": "multiplicative", "additive": 0}},
    "extragradient x grad_accumulation": {"gradient": {"kind": "extragradient"}, "train": {"grad_accumulation": 2}},
    "extragradient x DeepSpeed": {"gradient": {"kind": "extragradient"}, "train": {"deepspeed": "zero0"}},
    "extragradient x float16": {"gradient": {"kind": "extragradient"}, "model": {"name": "m", "dtype": "float16"}},
    "16-bit trained parameters x ZeRO 1 to 3": {"train": {"param_dtype": "bfloat16", "deepspeed": "zero2"}},
    "kl with teacher fp x no qat": {"regularize": [{"kind": "kl", "teacher": "fp"}]},
    "pace x packing": {"regularize": [{"kind": "pace"}]},
    "pace x gradient checkpointing": {
        "regularize": [{"kind": "pace"}],
        "data": {"packing": False},
        "train": {"gradient_checkpointing": True},
    },
    "pace fast x data that is no classification set": {
        "regularize": [{"kind": "pace", "variant": "fast"}],
        "data": {"packing": False},
    },
    "loss of options x packing": {"data": {"classification": OPTIONS}},
    "loss of options x train_on all": {"data": {"classification": OPTIONS, "packing": False, "train_on": "all"}},
    "loss of options x pace or kl": {
        "data": {"classification": OPTIONS, "packing": False},
        "regularize": [{"kind": "kl"}],
    },
    "mpc x update without two trained factors": {"regularize": [{"kind": "mpc"}], "update": {"kind": "ssb"}},
    "mpc x ZeRO 3": {"regularize": [{"kind": "mpc"}], "train": {"deepspeed": "zero3"}},
    "proximal x ZeRO 1 to 3": {"regularize": [{"kind": "proximal"}], "train": {"deepspeed": "zero1"}},
    "adapter x patch export": {"update": {"kind": "roco", "rows": 4}, "export": [{"format": "patch"}]},
    "update of every row x patch export": {
        "update": {"kind": "roco", "rows": 4, "columns": 1},
        "qat": {},
        "export": [{"format": "patch"}],
    },
    "grid without packed checkpoint x patch export": {
        "update": {"kind": "roco", "rows": 4},
        "qat": {"weights": {"kind": "mxfp4"}},
        "export": [{"format": "patch"}],
    },
    "unpackable bit width x patch export": {
        "update": {"kind": "roco", "rows": 4},
        "qat": {"weights": {"bits": 3}},
        "export": [{"format": "patch"}],
    },
    "frozen layers of bitsandbytes x patch of integers": {
        "model": {"name": "m", "storage": "int8"},
        "update": {"kind": "roco", "rows": 4},
        "qat": {"weights": {"bits": 8, "group_size": None}},
        "export": [{"format": "patch"}],
    },
    "frozen layers in 8 bits x patch of a code book": {
        "model": {"name": "m", "storage": "int8_group"},
        "update": {"kind": "roco", "rows": 4},
        "qat": {"weights": {"kind": "nf4"}},
        "export": [{"format": "patch"}],
    },
    "asymmetric or clipped activations x patch export": {
        "update": {"kind": "roco", "rows": 4},
        "qat": {"activations": {"bits": 8, "symmetric": False}},
        "export": [{"format": "patch"}],
    },
    "activations beside zero points x patch export": {
        "update": {"kind": "roco", "rows": 4},
        "qat": {"weights": {"symmetric": False}, "activations": {"bits": 8}},
        "export": [{"format": "patch"}],
    },
    "two grids with zero points x patch export": {
        "model": {"name": "m", "storage": "int8_group"},
        "update": {"kind": "roco", "rows": 4},
        "qat": {"weights": {"bits": 4, "symmetric": False}},
        "export": [{"format": "patch"}],
    },
    "update of any rank x peft export": {"update": {"kind": "ssb"}, "export": [{"format": "peft"}]},
    "entries chosen by gradient x zeroth-order source": {"update": {"kind": "sift"}, "gradient": {"kind": "spsa"}},
    "double quantization x storage without block scales": {"model": {"name": "m", "double_quant": True}},
    "simulation target x export": {"qat": {"target": "simulation"}, "export": [{"format": "merged"}]},
    "online rotation of down x export without transforms": {
        "qat": {"target": "vllm", "activations": {"bits": 8}},
        "export": [{"format": "compressed-tensors"}, {"format": "compressed-tensors", "profile": "vllm"}],
    },
    "profile vllm x format other than compressed-tensors": {"export": [{"format": "merged", "profile": "vllm"}]},
}


def test_every_incompatible_pair_has_a_case() -> None:
    assert set(ROWS) == {row.name for row in INCOMPATIBLE}


@pytest.mark.parametrize("name", ROWS)
def test_incompatible_pairs_are_refused_when_the_recipe_is_read(name: str) -> None:
    with pytest.raises(IncompatibleError) as error:
        recipe(**ROWS[name])
    row = next(r for r in INCOMPATIBLE if r.name == name)
    assert row.reason in str(error.value)
    assert row.instead in str(error.value)


REQUANTIZED = {
    "no qat x bnb export": {},
    "no qat x gptq export": {},
    "bitsandbytes storage x compressed-tensors export": {"qat": {"weights": {"bits": 4}}},
    "adapter on a packed base x compressed-tensors export": {},
}
"""The exports that ``force`` can write, with the grid that they are forced onto."""


def forced(name: str, **sections):
    return recipe(**{**ROWS[name], **sections, "export": [{**ROWS[name]["export"][0], "force": True}]})


@pytest.mark.parametrize("name", REQUANTIZED)
def test_force_lets_an_export_through_that_can_be_written_all_the_same(name: str) -> None:
    assert forced(name, **REQUANTIZED[name]).export[0].force


@pytest.mark.parametrize("name", [n for n in ROWS if "export" in n and n not in REQUANTIZED])
def test_force_does_not_postpone_the_refusal_of_what_no_file_can_hold(name: str) -> None:
    with pytest.raises(IncompatibleError):
        forced(name)


def test_force_needs_a_grid_to_force_onto() -> None:
    with pytest.raises(IncompatibleError, match="second time"):
        forced("bitsandbytes storage x compressed-tensors export")


def test_a_high_rate_for_v_is_cautioned_for_dense_updates_only() -> None:
    optim = {"lr_scale": {"v_proj": 4}}
    assert "collapse" in cautions(recipe(update={"kind": "dense"}, optim=optim))[0]
    assert cautions(recipe(update={"kind": "lowrank"}, optim=optim)) == []


def test_overrides_reach_into_sections_and_lists() -> None:
    raw = apply_overrides({**MINIMAL, "export": [{"format": "merged"}]}, ["train.lr_=1", "export.0.format=peft"])
    assert raw["train"] == {"lr_": 1}
    assert raw["export"] == [{"format": "peft"}]


@pytest.mark.parametrize(
    ("text", "value"),
    [("a.b=1e-4", 1e-4), ("a.b=true", True), ("a.b=null", None), ("a.b=[1, 2]", [1, 2]), ("a.b=x", "x")],
)
def test_override_values_are_yaml(text: str, value) -> None:
    assert parse_override(text) == (["a", "b"], value)


@pytest.mark.parametrize("text", ["steps", "=3", "a=[1"])
def test_malformed_overrides_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="override"):
        parse_override(text)


def test_overriding_through_a_value_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"model.name is 'm', not a section"):
        apply_overrides(MINIMAL, ["model.name.x=1"])


def test_both_spellings_of_overrides() -> None:
    given = ["train.steps=3", "--optim.lr", "1e-3", "--data.limit=5"]
    assert overrides_from(given) == ["train.steps=3", "--optim.lr=1e-3", "--data.limit=5"]


def test_a_run_folder_is_accepted_for_its_recipe(tmp_path: Path) -> None:
    save_recipe(recipe(train={"steps": 7}), tmp_path)
    assert load_recipe(tmp_path, ["train.seed=3"]).train.model_dump()["seed"] == 3
    assert load_recipe(tmp_path).train.steps == 7


def test_missing_files_and_broken_yaml_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "x.yaml")
    with pytest.raises(RecipeError, match="not a run folder"):
        load_recipe(tmp_path)
    broken = tmp_path / "b.yaml"
    broken.write_text("model: {name: [}")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(broken)
    broken.write_text("model: !!python/object/apply:os.system ['true']")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(broken)
