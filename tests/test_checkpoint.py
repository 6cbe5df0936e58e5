"""Checkpoints: the published layout, atomic saving, and refused files."""

import errno
import os
import pickle
import re
import resource
import stat

import pytest
import safetensors.torch
import torch
from conftest import TINY, fill_by_recipe, load_script, one_message, options, run_script

import config
import utils
from bgpt import checkpoint, system
from bgpt import model as models


def published_checkpoint(golden, model):
    """A checkpoint as transformers 4.18 wrote it: old buffers, whole optimizer, lr_sched, and the recipe's weights."""
    state = model.state_dict()
    layout = golden["state_dict_written_by_transformers_4.18"]
    old = {}
    for name, (shape, dtype) in layout.items():
        if name.endswith(".attn.bias"):
            old[name] = torch.tril(torch.ones(shape, dtype=torch.uint8))
        elif name.endswith(".attn.masked_bias"):
            old[name] = torch.tensor(-1e4)
        else:
            old[name] = state[name].clone().contiguous()
        assert list(old[name].shape) == shape and str(old[name].dtype) == dtype
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    moments = {
        i: {"step": 7, "exp_avg": torch.zeros(p.shape), "exp_avg_sq": torch.ones(p.shape)}
        for i, p in enumerate(model.parameters())
    }
    group = {"lr": 9e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "amsgrad": False, "initial_lr": 1e-4}
    group["params"] = optimizer.state_dict()["param_groups"][0]["params"]
    return {
        "model": old,
        "optimizer": {"state": moments, "param_groups": [group]},
        "lr_sched": {"base_lrs": [1e-4], "last_epoch": 7, "_step_count": 8, "_last_lr": [9e-5], "lr_lambdas": [None]},
        "epoch": 1,
        "best_epoch": 1,
        "min_eval_loss": 5.5,
    }


def test_published_layout_loads(tmp_path, golden, golden_model):
    published = published_checkpoint(golden, golden_model)
    assert sum(name.endswith(".attn.bias") for name in published["model"]) == 4
    torch.save(published, tmp_path / "weights.pth")
    model = models.load_model(str(tmp_path / "weights.pth"), "cpu").net
    loaded = checkpoint.load_checkpoint(tmp_path / "weights.pth", "WEIGHTS_PATH")
    for name, tensor in golden_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert loaded["min_eval_loss"] == 5.5
    assert checkpoint.model_sizes(loaded["model"], "x") == utils.ModelSizes(**golden["recipe"]["sizes"])


def test_training_goes_on_from_the_published_layout(tmp_path, golden, golden_model):
    torch.save(published_checkpoint(golden, golden_model), tmp_path / "weights.pth")
    (tmp_path / "data").mkdir()
    for i in range(4):
        (tmp_path / "data" / f"{i}.bin").write_bytes(bytes(range(40)))
    settings = options(
        **golden["recipe"]["sizes"], TRAIN_FOLDERS=["data"], EVAL_FOLDERS=["data"], NUM_EPOCHS=2, BATCH_SIZE=2
    )
    done = run_script("train-gen.py", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resumes from weights.pth after epoch 1\n" in done.stdout  # its loss does not compare with bits per byte
    assert torch.load(tmp_path / "weights-last.pth", weights_only=True)["epoch"] == 2


def test_classifier_checkpoint(tmp_path):
    model = fill_by_recipe(utils.bGPTForClassification(utils.make_configs(4, 16, 64, 2, 1)[0], 3))
    checkpoint.save_checkpoint(tmp_path / "cls.pth", {"model": model.state_dict(), "labels": {"a.x": 0, "b.x": 1, "c.x": 2}})
    loaded = models.load_model(str(tmp_path / "cls.pth"), "cpu").net
    assert isinstance(loaded, utils.bGPTForClassification)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True))


class Hostile:
    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def broken_checkpoints(folder, model):
    """Yields (name, expected description) of files in `folder` that must not load."""
    state = model.state_dict()
    whole = folder / "whole.pth"
    torch.save({"model": state}, whole)
    hostile = Hostile()
    hostile.target = folder / "hacked"
    torch.save({"model": state, "epoch": hostile}, folder / "hostile.pth")
    (folder / "raw.pth").write_bytes(pickle.dumps(hostile))
    (folder / "short.pth").write_bytes(whole.read_bytes()[:-2000])
    (folder / "empty.pth").write_bytes(b"")
    (folder / "text.pth").write_text("hello, I am no checkpoint\n" * 50)
    torch.save([1, 2], folder / "list.pth")
    torch.save({"model": {"a": 3}}, folder / "numbers.pth")
    torch.save({"model": {}}, folder / "nothing.pth")
    torch.save({"model": {0: torch.zeros(1)}}, folder / "keys.pth")
    torch.save({"model": {**state, "x": torch.zeros(3).to_sparse()}}, folder / "sparse.pth")
    wpe = "patch_level_decoder.base.wpe.weight"
    torch.save({"model": {**state, wpe: torch.zeros(1, 64).expand(10**13, 64)}}, folder / "vast.pth")
    torch.save({"model": {**state, "patch_level_decoder.base.h.100000000.x": torch.zeros(1)}}, folder / "deep.pth")
    torch.save({"model": {**state, "patch_level_decoder.base.ln_f.bias": torch.full((64,), torch.nan)}}, folder / "nan.pth")
    torch.save({"model": {**state, "extra.weight": torch.zeros(1)}}, folder / "extra.pth")
    missing = dict(state)
    del missing["patch_level_decoder.base.h.1.mlp.c_fc.bias"]
    torch.save({"model": missing}, folder / "missing.pth")
    torch.save({"model": {**state, "patch_level_decoder.base.ln_f.bias": torch.zeros(3)}}, folder / "shape.pth")
    torch.save({"model": {**state, "byte_level_decoder.base.lm_head.weight": torch.zeros(257, 64)}}, folder / "tied.pth")
    (folder / "folder.pth").mkdir()
    return [
        ("hostile.pth", "refused"),
        ("raw.pth", "refused|no checkpoint"),
        ("short.pth", "damaged"),
        ("empty.pth", "damaged"),
        ("text.pth", "no checkpoint|refused"),
        ("list.pth", "is no bGPT checkpoint"),
        ("numbers.pth", "is no bGPT checkpoint"),
        ("keys.pth", "is no bGPT checkpoint"),
        ("sparse.pth", "is no bGPT checkpoint"),
        ("vast.pth", "is no bGPT checkpoint"),
        ("deep.pth", "h.2.ln_1.weight"),
        ("nan.pth", "NaN or infinite values in patch_level_decoder.base.ln_f.bias"),
        ("nothing.pth", "patch_embedding.weight is missing"),
        ("extra.pth", 'Unexpected key.*"extra.weight"'),
        ("missing.pth", 'Missing key.*h.1.mlp.c_fc.bias"'),
        ("shape.pth", r"ln_f.bias.*\[3\].*\[64\]"),
        ("tied.pth", "lm_head.weight differs"),
        ("folder.pth", "is a folder"),
        ("absent.pth", "does not exist"),
    ]


def test_broken_and_hostile_checkpoints_are_refused(tmp_path, tiny_model):
    for name, words in broken_checkpoints(tmp_path, tiny_model):
        with pytest.raises(system.UserError, match=words) as caught:
            models.load_model(str(tmp_path / name), "cpu", name="WEIGHTS_PATH")
        assert str(caught.value).startswith("WEIGHTS_PATH: ") and name in str(caught.value)
    assert not (tmp_path / "hacked").exists()  # no code of a checkpoint ran


def files_of_others(folder, state):
    """Yields the paths of files that hold a `model` dict as other programs save it."""
    state = {name: tensor.clone().contiguous() for name, tensor in state.items()}
    untied = {name: tensor for name, tensor in state.items() if not name.endswith("lm_head.weight")}
    torch.save(state, folder / "bare.pth")
    yield folder / "bare.pth"
    for i, prefix in enumerate(("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")):
        torch.save({"model": {prefix + name: tensor for name, tensor in state.items()}}, folder / f"wrapped{i}.pth")
        yield folder / f"wrapped{i}.pth"
    for name, contents in (("weights.safetensors", untied), ("tied.safetensors", state)):
        safetensors.torch.save_file(contents, folder / name)
        yield folder / name


def test_weights_that_others_saved_load_for_inference(tmp_path, tiny_model, monkeypatch):
    inference = load_script("inference")
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "a.x").write_bytes(b"abc")
    monkeypatch.chdir(tmp_path)
    for name, value in {"MODE": "complete", "TEMPERATURE": 0, "PRECISION": "fp32"}.items():
        monkeypatch.setattr(config, name, value)
    made = set()
    for path in files_of_others(tmp_path, tiny_model.state_dict()):
        monkeypatch.setattr(config, "INFERENCE_WEIGHTS_PATH", path.name)
        monkeypatch.setattr(config, "OUTPUT_FOLDER", f"made-{path.name}")
        inference.check_settings()
        assert inference.main() == 0
        made.add((tmp_path / f"made-{path.name}" / "a.x").read_bytes())
    assert len(made) == 1


def test_weights_that_others_saved_are_what_training_starts_from(tmp_path, tiny_model):
    """Generative models for both trainers, and the patch-level decoder of a classifier without labels."""
    train_cls, generative, classifier = load_script("train-cls"), utils.ModelSizes(**TINY), utils.ModelSizes(4, 16, 64, 2, None, 3)
    for path in files_of_others(tmp_path, tiny_model.state_dict()):
        model = generative.build()
        checkpoint.load_sized_weights(model, generative, str(path), "PRE_WEIGHTS_PATH")
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), tiny_model.state_dict().values(), strict=True))
    other = fill_by_recipe(classifier.build())
    for source in (tiny_model, other):
        for path in files_of_others(tmp_path, source.state_dict()):
            model = classifier.build()
            head = model.classifier.weight.clone()
            train_cls.load_pre_trained(model, classifier, {"a": 0, "b": 1, "c": 2}, str(path), "PRE_WEIGHTS_PATH")
            for name, tensor in source.patch_level_decoder.state_dict().items():
                assert torch.equal(model.patch_level_decoder.state_dict()[name], tensor), name
            assert torch.equal(model.classifier.weight, head)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1331337229\n"


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize(
    "content, words",
    [
        (POINTER, "it is a Git LFS pointer, .* `git lfs pull`"),
        (b"<!DOCTYPE html>\n<html>", "it is a web page, not the weights"),
        (b"\xef\xbb\xbf\r\n <html lang='en'>", "it is a web page"),
        (b"12345678{not what it seems", "it is damaged, truncated, or no checkpoint"),
    ],
)
def test_files_that_stand_in_for_weights_are_named(tmp_path, monkeypatch, name, content, words):
    (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "INFERENCE_WEIGHTS_PATH", name)
    with pytest.raises(system.UserError, match=f"INFERENCE_WEIGHTS_PATH: cannot load '{name}': {words}"):
        load_script("inference").main()
    for script, sizes in (("train-gen", utils.ModelSizes(**TINY)), ("train-cls", utils.ModelSizes(4, 16, 64, 2, None, 3))):
        with pytest.raises(system.UserError, match=f"PRE_WEIGHTS_PATH: cannot load '{name}': {words}"):
            if script == "train-gen":
                checkpoint.load_sized_weights(sizes.build(), sizes, name, "PRE_WEIGHTS_PATH")
            else:
                load_script(script).load_pre_trained(sizes.build(), sizes, {}, name, "PRE_WEIGHTS_PATH")


def test_missing_and_unknown_layers_are_all_listed(tiny_model):
    state = tiny_model.state_dict()
    for key in list(state):
        if ".h.0.ln_1." in key:
            state["x." + key] = state.pop(key)
    with pytest.raises(system.UserError) as caught:
        checkpoint.load_weights(tiny_model, state, "here")
    assert str(caught.value).count(".h.0.ln_1.") == 8 and str(caught.value).count('"x.') == 4


def test_tied_weight_may_be_left_out(tiny_model):
    state = {k: v.clone() for k, v in tiny_model.state_dict().items() if not k.endswith("lm_head.weight")}
    other = utils.ModelSizes(**TINY).build()
    checkpoint.load_weights(other, state, "here")
    assert torch.equal(other.byte_level_decoder.base.lm_head.weight, state["byte_level_decoder.base.transformer.wte.weight"])


def test_other_sizes_name_the_constants_to_change(tiny_model):
    with pytest.raises(system.UserError, match=r"set PATCH_SIZE = 4 \(now 16\), PATCH_LENGTH = 16 \(now 512\), or"):
        checkpoint.check_sizes(utils.ModelSizes(16, 512, 64, 2, 1), tiny_model.state_dict(), "here")
    with pytest.raises(system.UserError, match="is a generative model; here a classifier is needed"):
        checkpoint.check_sizes(utils.ModelSizes(4, 16, 64, 2, None, 3), tiny_model.state_dict(), "here")


def test_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "weights.pth"
    checkpoint.save_checkpoint(path, {"model": {}, "epoch": 1})
    before = path.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        checkpoint.save_checkpoint(path, {"model": {}, "epoch": lambda: None})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["weights.pth"]


def test_full_disk_is_an_oserror_that_names_the_file(tmp_path):
    """A limit on file sizes simulates a full disk."""
    path = tmp_path / "weights.pth"
    checkpoint.save_checkpoint(path, {"epoch": 1})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match="weights.pth"):
            checkpoint.save_checkpoint(path, {"model": torch.zeros(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["weights.pth"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
def test_what_ends_a_save_is_what_is_raised(tmp_path, monkeypatch, kind):
    """PyTorch raises another error after it, as for a second Ctrl-C."""

    def save(contents, file):
        try:
            raise kind(2)
        finally:
            raise RuntimeError("unexpected pos")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(kind):
        checkpoint.save_checkpoint(tmp_path / "weights.pth", {})
    assert not os.listdir(tmp_path)


def test_saved_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    checkpoint.save_checkpoint(tmp_path / "weights.pth", {})
    assert (tmp_path / "weights.pth").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_replaced_file_keeps_its_mode_and_group(tmp_path):
    path = tmp_path / "weights.pth"
    for mode in (0o600, 0o664, 0o750):
        path.write_text("old")
        path.chmod(mode)
        if os.geteuid() == 0:
            os.chown(path, 1, 54321)
        before, modes = path.stat(), []

        def content(file):
            modes.append(stat.S_IMODE(os.fstat(file.fileno()).st_mode))

        system.write_whole(str(path), content)
        after = path.stat()
        assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
        assert modes == [mode] and after.st_ino != before.st_ino  # private before the content is written


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EIO])
def test_a_file_system_without_fsync(tmp_path, monkeypatch, number):
    """A folder's fsync is best effort. A file's fsync may be missing, but not fail."""
    path, fails, fsync, opened = tmp_path / "weights.pth", [stat.S_ISDIR], os.fsync, os.open

    def refuse(descriptor):
        if any(is_kind(os.fstat(descriptor).st_mode) for is_kind in fails):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    def refuse_folders(path, *arguments, **keywords):
        if os.path.isdir(path):
            raise OSError(number, os.strerror(number), path)
        return opened(path, *arguments, **keywords)

    monkeypatch.setattr(os, "fsync", refuse)
    system.write_whole(str(path), b"one")
    monkeypatch.setattr(os, "open", refuse_folders)
    system.write_whole(str(path), b"two")
    assert path.read_bytes() == b"two"
    fails.append(stat.S_ISREG)
    if number in (errno.EINVAL, errno.ENOTSUP):
        system.write_whole(str(path), b"three")
    else:
        with pytest.raises(OSError, match=re.escape(str(path))):
            system.write_whole(str(path), b"three")
        assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["weights.pth"]


def test_backups_never_replace_each_other(tmp_path):
    path = tmp_path / "weights.pth"
    for i in range(3):
        path.write_text(str(i))
        system.keep_backup(str(path))
        assert path.read_text() == str(i)
        path.unlink()
    assert [(tmp_path / f"weights.pth.bak{n}").read_text() for n in ("", "2", "3")] == ["0", "1", "2"]


def test_a_backup_of_a_link_keeps_what_it_leads_to(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "weights.pth").write_text("old")
    (tmp_path / "weights.pth").symlink_to(tmp_path / "there" / "weights.pth")
    system.keep_backup(str(tmp_path / "weights.pth"))
    system.write_whole(str(tmp_path / "weights.pth"), b"new")
    assert (tmp_path / "weights.pth.bak").read_text() == "old" and (tmp_path / "there" / "weights.pth").read_text() == "new"


@pytest.mark.parametrize("script", ["train-gen.py", "inference.py"])
def test_scripts_refuse_a_hostile_checkpoint(tmp_path, tiny_model, script):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.bin").write_bytes(b"abc")
    path, hostile = tmp_path / "weights.pth", Hostile()
    hostile.target = tmp_path / "hacked"
    torch.save({"model": tiny_model.state_dict(), "epoch": hostile}, path)
    before = path.read_bytes()
    message = one_message(run_script(script, *options(**TINY, TRAIN_FOLDERS=["data"], EVAL_FOLDERS=["data"]), cwd=tmp_path))
    assert "refused" in message and len(message.splitlines()) == 1
    assert path.read_bytes() == before and not hostile.target.exists()
