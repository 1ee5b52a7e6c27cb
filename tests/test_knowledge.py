"What is known about classes, and the prompts that are composed of it"

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ltnb.core import DataError, UsageError
from ltnb.data import LongTail
from ltnb.jobs import Job, open_job
from ltnb.knowledge import (
    CONTEXT,
    LIMITS,
    SHIPPED,
    Knowledge,
    check_knowledge,
    check_tokens,
    knowledge_of,
    longest_prompt,
    prompt_text,
    read_knowledge,
    shipped,
    token_count,
    with_article,
    write_knowledge,
)
from ltnb.prompts import (
    DISCL_PREFIX,
    WORDS,
    captions,
    class_texts,
    n_prompts,
    prompt_plan,
    prompts_of,
    scene_sentences,
    told,
    turned,
    wheels,
)

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(scope="module")
def known():
    return knowledge_of("cifar10", CIFAR10)


def bare(name="cat", **more):
    "A class that has all that is asked for"
    texts = {f: [f"{name} {f} {i}" for i in range(LIMITS[f][0])] for f in ("features", "scenes", "views")}
    return Knowledge(**{"name": name, "hypernym": "animal", **texts, **more})


# what ships
@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_is_whole(name):
    known = shipped(name)
    assert len(known) == (100 if name == "cifar100" else 10)
    assert check_knowledge(known) == []
    said = Counter(t for k in known.values() for t in (*k.features, *k.scenes))
    assert max(said.values()) <= 4, "no filler that repeats between classes"
    assert not [t for t in said if t.endswith(".") or t != t.strip()]


def test_class_names_are_those_of_the_sources():
    from torchvision import datasets

    names = {
        "digits": LongTail.digits().class_names,
        "fashion_mnist": datasets.FashionMNIST.classes,
        "cifar10": CIFAR10,
        "imagenette": [names[0] for names in datasets.Imagenette._WNID_TO_CLASS.values()],
    }
    for dataset, expected in names.items():
        assert [k.name for k in knowledge_of(dataset, expected)] == list(expected)
        assert len(shipped(dataset)) == len(expected)
    hundred = list(shipped("cifar100"))
    assert hundred == sorted(hundred) and {"aquarium_fish", "sweet_pepper", "worm"} <= set(hundred)


# files
def test_written_is_read(tmp_path, known):
    path = tmp_path / "k.json"
    write_knowledge(path, {k.name: k for k in known}, by="a person")
    assert list(read_knowledge(path).values()) == known
    assert json.loads(path.read_text())["by"] == "a person"
    assert knowledge_of("npz", CIFAR10[::-1], path) == known[::-1]


def test_names_may_be_spelled_otherwise():
    fish, golf = knowledge_of("cifar100", ["Aquarium Fish", "flatfish"])
    assert fish.name == "Aquarium Fish" and fish.called == "aquarium fish"
    assert golf.confused_with == ["Aquarium Fish"], "named as the data name it; classes that are not there are left out"


def test_simple_forms_are_read(tmp_path):
    path = tmp_path / "simple.json"
    path.write_text(json.dumps({"cat": ["whiskers", "a tail"], "dog": {"features": ["a snout"]}}))
    assert [k.features for k in read_knowledge(path).values()] == [["whiskers", "a tail"], ["a snout"]]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "not written by ltnb"),
        ('{"method": "ldmlr"}', "not written by ltnb"),
        ('{"classes": {"name": "cat"}}', "must be a list"),
        ('{"classes": [{"name": "cat", "colour": "red"}]}', "cat.*colour"),
        ('{"classes": [{"name": "cat", "features": "fur"}]}', "cat.*features"),
        ('{"classes": [{"features": ["fur"]}]}', "without a name.*name"),
        ('{"classes": ["cat"]}', "class 1"),
        ('{"classes": [{"name": "cat"}, {"name": "cat"}]}', "'cat' twice"),
        ('{"format": 9, "ltnb": "3.0", "classes": []}', "format 9"),
    ],
)
def test_damaged_files_are_named(tmp_path, text, says):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(DataError, match=says) as e:
        read_knowledge(path)
    assert "bad.json" in str(e.value)


def test_classes_without_knowledge_are_named(tmp_path):
    with pytest.raises(UsageError, match="no knowledge ships for 'npz'.*--knowledge"):
        knowledge_of("npz", ["a", "b"])
    with pytest.raises(UsageError, match="2 of 3 classes: 'lory', 'trucks' .did you mean 'truck'"):
        knowledge_of("cifar10", ["cat", "lory", "trucks"])
    with pytest.raises(UsageError, match=r"other classes \(airplane.*\) than those of the data \(0, 1\)"):
        knowledge_of("digits", ["0", "1"], "cifar10")
    with pytest.raises(UsageError, match="Did you mean 'cifar10'"):
        shipped("cifar1")
    write_knowledge(tmp_path / "none.json", {})
    with pytest.raises(UsageError, match="no class"):
        knowledge_of("digits", ["0"], tmp_path / "none.json")
    with pytest.raises(DataError, match=r"absent\.json"):
        knowledge_of("digits", ["0"], tmp_path / "absent.json")


# checks
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"features": []}, "has no features"),
        ({"features": ["a cat's fur"]}, "only 1 features"),
        ({"scenes": [f"place {i}" for i in range(20)]}, "20 scenes, at most 12"),
        ({"views": ["Above", "above", "left", "right"]}, "'above' twice"),
        ({"views": ["", "above", "left", "right"]}, "empty text among its views"),
        ({"hypernym": ""}, "no hypernym"),
        ({"called": "furry pet"}, "called 'furry pet', without its name"),
        ({"name": "17", "called": "17"}, "cannot picture"),
        ({"confused_with": ["lynx"], "telling_apart": "size"}, "'lynx', which is no class"),
        ({"confused_with": ["cat"], "telling_apart": "size"}, "with itself"),
        ({"confused_with": ["cat"]}, "tells them apart"),
        ({"scenes": [f"{i} " + "very " * 80 for i in range(8)]}, "77 are read"),
    ],
)
def test_findings(change, says):
    k = bare(**change)
    assert any(says in f and repr(k.name) in f for f in check_knowledge({k.name: k})), check_knowledge({k.name: k})
    assert check_knowledge({"cat": bare()}) == []


def test_two_classes_with_the_same_text():
    a, b = bare("cat"), bare("dog", features=bare("cat").features[::-1])
    assert check_knowledge({"cat": a, "dog": b}) == ["'dog' has the same features as 'cat'."]


def test_the_schema_asks_for_every_field():
    schema = Knowledge.model_json_schema()
    assert set(schema["required"]) == set(Knowledge.model_fields) and schema["additionalProperties"] is False
    assert all("default" not in p and p["description"] for p in schema["properties"].values())


def test_articles():
    words = ["apple", "hour glass", "unicycle", "umbrella", "English springer", "8", "T-shirt"]
    said = ["an apple", "an hour glass", "a unicycle", "an umbrella", "an English springer", "an 8", "a T-shirt"]
    assert [with_article(w) for w in words] == said


# tokens
def test_tokens_are_those_of_open_clip():
    import open_clip

    text = "a photo of a cat, a kind of furry pet, on a windowsill"
    ids = open_clip.get_tokenizer("ViT-B-32")([text])[0]
    assert token_count(text) == int((ids != 0).sum())
    check_tokens(["cat " * 75])
    with pytest.raises(UsageError, match="1 of 2 texts.*has 78"):
        check_tokens(["cat", "cat " * 76])


# prompts
def test_prompts_do_not_repeat_while_combinations_last(known):
    n = n_prompts(known[3])
    prompts = prompts_of(known, 3, np.arange(2 * n))
    assert len(set(prompts)) == len(set(prompts[:n])) == n
    assert prompts[:n] == prompts[n:]
    assert all(p.startswith("a photo of a domestic cat, a kind of furry pet, with ") for p in prompts)


def test_a_prompt_does_not_depend_on_the_others(known):
    all_of, some = prompts_of(known, 5, np.arange(400)), [7, 399, 0, 7]
    assert prompts_of(known, 5, some) == [all_of[k] for k in some]
    plan = prompt_plan(known, [3, 0, 5, *[1] * 7])
    for row in plan.rows():
        assert row["prompt"] == prompts_of(known, row["class"], [row["k"]])[0]
    assert prompts_of(known, 5, np.arange(9), seed=1) != all_of[:9]


def test_neighbours_differ_and_all_words_are_used(known):
    prompts = prompts_of(known, 0, np.arange(10))
    assert all(sum(s in p for p in prompts) == 1 for s in known[0].scenes)
    many = prompts_of(known, 0, np.arange(300))
    for field, share in (("features", 2), ("views", 1)):
        counts = [sum(t in p for p in many) for t in getattr(known[0], field)]
        assert min(counts) > 0.6 * share * 300 / len(counts)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 5))
def test_every_combination_comes_once(p, s, v, seed):
    at = turned(np.arange(p * s * v), (p, s, v), seed)
    assert len(set(zip(*(x.tolist() for x in at), strict=True))) == p * s * v
    assert all(0 <= x.min() and x.max() < n for x, n in zip(at, (p, s, v), strict=True))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
def test_prompts_can_be_read_to_the_end(scene, feature, view):
    k = bare(
        scenes=["in " + "very " * scene + "deep snow", "indoors"],
        features=["a " + "long " * feature + "tail", "fur"],
        views=["from " + "so " * view + "far"],
    )
    try:
        lists = wheels(k)
    except UsageError as e:
        assert token_count(longest_prompt(k, 1, False)) > CONTEXT and "shorten" in str(e)
        return
    prompts = prompts_of([k], 0, np.arange(n_prompts(k)))
    check_tokens(prompts)
    assert len(set(prompts)) == len(prompts)
    if token_count(longest_prompt(k)) <= CONTEXT:
        assert lists.views == list(k.views) and len(lists.pairs[0]) == 2


def test_little_is_enough_for_a_prompt():
    k = Knowledge(name="okapi")
    assert prompts_of([k], 0, range(2)) == ["a photo of an okapi"] * 2
    k = Knowledge(name="okapi", features=["striped legs", "striped legs."])
    assert prompts_of([k], 0, [0]) == ["a photo of an okapi, with striped legs"]


# controls
def test_name_only_says_nothing_else(known):
    assert set(prompts_of(known, 0, range(5), "name only")) == {"a photo of an airplane"}


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_knowledge_is_another_class_s(known, seed):
    shuffled = told(known, "shuffled knowledge", seed)
    for own, other in zip(known, shuffled, strict=True):
        assert (own.name, own.called, own.hypernym) == (other.name, other.called, other.hypernym)
        assert own.features != other.features and own.scenes != other.scenes
    assert Counter(map(tuple, (k.features for k in shuffled))) == Counter(map(tuple, (k.features for k in known)))
    assert shuffled == told(known, "shuffled knowledge", seed) and shuffled != told(known, WORDS[2], seed + 1)


def test_bad_words(known):
    with pytest.raises(UsageError, match="Did you mean 'name only'"):
        prompts_of(known, 0, [0], "names only")
    with pytest.raises(UsageError, match="at least 2 classes"):
        told(known[:1], "shuffled knowledge")
    with pytest.raises(UsageError, match="3 numbers of items for 10 classes"):
        prompt_plan(known, [1, 2, 3])


# plan, captions, texts, scenes
def test_a_plan_is_sharded(tmp_path, known):
    plan = prompt_plan(known, [40] * 10)
    job = open_job(tmp_path, plan, "a model", Job(shard_size=64))
    assert len(job.shards) == 7 and [p for s in job.shards for p in s["prompt"]] == plan["prompt"].tolist()
    longer = prompt_plan(known, [50] * 10)
    assert set(plan.ids) < set(longer.ids), "what was planned keeps its ids"


def test_captions_go_with_their_labels(known):
    labels = np.array([3, 0, 3, 9])
    texts = captions(known, labels, seed=1)
    assert all(prompt_text(known[c])[:20] in t for c, t in zip(labels, texts, strict=True))
    assert texts[0] != texts[2] and texts == captions(known, labels, seed=1)


def test_the_discriminator_hears_name_and_kind_only(known):
    for k in known:
        texts = class_texts(k)
        assert len(set(texts)) >= 3 and all(k.called in t for t in texts)
        assert not [w for w in (*k.features, *k.scenes, *k.views) for t in texts if w in t]


@pytest.mark.parametrize("dataset", ["digits", "imagenette", "cifar100"])
def test_ten_scenes_a_class(dataset):
    for k in list(shipped(dataset).values())[:12]:
        texts = scene_sentences(k, prefix=DISCL_PREFIX)
        assert len(set(texts)) == 10
        assert all(len(t.removeprefix(DISCL_PREFIX).split()) >= 15 and k.called in t for t in texts)
        check_tokens(texts)
    with pytest.raises(UsageError, match="'okapi'.*no features"):
        scene_sentences(Knowledge(name="okapi"))
