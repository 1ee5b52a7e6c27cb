"Parts that several runs share: the same bytes with and without a store, never those of other code or other inputs."

import os
import threading

import numpy as np
import pytest
import torch

from ltnb.baseline import Baseline
from ltnb.baseline_steps import BaselineConfig
from ltnb.core import read_jsonl
from ltnb.ldmlr import LDMLR
from ltnb.ldmlr_settings import LDMLRConfig
from ltnb.store import Content, NotShared, Store, alone_with, code_hash, content_key

TINY = dict(n_max=40, imb_ratio=8.0, n_epochs=3, bs=16, device="cpu", precision="fp32", threads="1", wd=5e-4)
FEW = dict(n_steps=10, per_class=5, head_steps=5, scratch_steps=5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "LDMLR and the baseline, without a store and with a shared one"
    root, found = tmp_path_factory.mktemp("store"), {}
    for kind in ("alone", "shared"):
        os.environ.pop("LTNB_STORE", None)
        if kind == "shared":
            os.environ["LTNB_STORE"] = str(root / "store")
        try:
            found[kind, "ldmlr"] = LDMLR().run(LDMLRConfig(out=str(root / kind / "ldmlr"), **TINY, **FEW)).path
            found[kind, "plain"] = Baseline().run(BaselineConfig(out=str(root / kind / "plain"), **TINY)).path
        finally:
            os.environ.pop("LTNB_STORE", None)
    return found


def reused(path):
    return [r for r in read_jsonl(path / "timing.jsonl") if "reused" in r]


@pytest.mark.parametrize("name", ["ldmlr", "plain"])
def test_a_store_changes_no_byte(runs, name):
    a, b = runs["alone", name], runs["shared", name]
    for file in ("scores.json", "metrics.jsonl", "model/model.safetensors"):
        assert (a / file).read_bytes() == (b / file).read_bytes(), file


def test_the_classifier_is_trained_once_and_it_is_said(runs):
    assert not reused(runs["alone", "ldmlr"]) + reused(runs["alone", "plain"]) + reused(runs["shared", "ldmlr"])
    (row,) = reused(runs["shared", "plain"])
    assert row["made_by"] == "shared/ldmlr" and row["saved"] > 0 and row["stage"] == "classifier"


def test_keys_see_everything_that_matters_and_nothing_else():
    x = torch.arange(6.0).reshape(2, 3)
    key = content_key("part", x, {"a": 1})
    assert key == content_key("part", x.clone(), {"a": 1})
    others = [x + 1, x.double(), x.reshape(3, 2), x.bfloat16(), x.numpy().astype(np.float16), x[:1]]
    assert len({key, *(content_key("part", o, {"a": 1}) for o in others)}) == 1 + len(others)
    assert key != content_key("part", x, {"a": 1.0}) and key != content_key("part", x, {"a": True})
    net = torch.nn.Linear(2, 2)
    before = content_key(net)
    with torch.no_grad():
        net.bias[0] += 1
    assert before != content_key(net)


def test_what_has_no_fixed_content_is_not_shared():
    for x in (torch.Generator(), object(), np.array([object()]), threading.Lock()):
        assert content_key("part", x) is None
    with pytest.raises(NotShared):
        Content().feed(torch.Generator())


def test_parts_of_other_code_are_not_seen(tmp_path, monkeypatch):
    (tmp_path / "made.safetensors").write_bytes(b"weights")
    Store(tmp_path / "s").put("0" * 32, tmp_path / "made.safetensors", 2.0, what="a part")
    assert Store(tmp_path / "s").facts("0" * 32)["seconds"] == 2.0
    assert Store(tmp_path / "s").folder.name == code_hash()
    monkeypatch.setattr("ltnb.store.code_hash", lambda: "other")
    assert Store(tmp_path / "s").facts("0" * 32) is None


def test_two_at_once_make_a_part_once(tmp_path):
    made, store = [], Store(tmp_path / "s")

    def work():
        with alone_with(store, "1" * 32, "a part") as there:
            if there:
                return
            made.append(threading.get_ident())
            (tmp_path / f"{made[-1]}").write_bytes(b"weights")
            store.put("1" * 32, tmp_path / f"{made[-1]}", 1.0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert len(made) == 1 and not list(store.folder.glob("*.lock"))
