"Images from words: pipelines of diffusers, built tiny here, and the small text-conditional model of a set itself"

import json
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ltnb import diffusion, text_diffusion
from ltnb.clip_training import ClipTraining, clip_config, new_clip
from ltnb.core import DataError, LtnbError, UsageError
from ltnb.diffusion import UNETS, train_diffusion
from ltnb.draw import ItemScore, draw_until
from ltnb.jobs import Plan
from ltnb.ldmlr import LDMLRConfig
from ltnb.progress import Progress
from ltnb.runs import Run
from ltnb.samplers import Sampling
from ltnb.synthetic import make_synthetic
from ltnb.text2image import (
    EncodedPrompts,
    TextToImage,
    pipeline_folder,
    own_sampling,
    scheduler_for,
    shrink,
    text_maker,
)
from ltnb.text_diffusion import (
    Captions,
    Reader,
    TextDiffusion,
    ToldTexts,
    text_image_maker,
    text_images,
    text_states,
    train_text_diffusion,
)
from tiny_pipelines import saved, stable_diffusion, stable_diffusion_xl

SMALL = dict(block_out_channels=(8, 16), layers_per_block=1, dropout=0.1, norm_num_groups=4, attention=False)
TEXTS = ["a photo of a cat", "a drawing of a cat", "a photo of a dog"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(Progress, "quiet", True)
    monkeypatch.setitem(UNETS, "small", SMALL)


def plan_of(prompts, c=3, ks=None):
    return Plan({"class": [c] * len(prompts), "k": list(range(len(prompts))) if ks is None else ks, "prompt": prompts})


def apart(a, b):
    return (a.int() - b.int()).abs().max().item()


# pipelines of diffusers
LCM = "LatentConsistencyModelPipeline"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("pipelines")
    known = {"sd": stable_diffusion(checker=True), "xl": stable_diffusion_xl(), "lcm": stable_diffusion(LCM)}
    known["refiner"] = stable_diffusion_xl(refiner=True)
    return {name: saved(home / name, pipe) for name, pipe in known.items()}


@pytest.fixture(scope="module")
def pipes(folders):
    return {name: TextToImage.open(folders[name]) for name in ("sd", "xl", "lcm")}


@pytest.mark.parametrize("name", ["sd", "xl", "lcm"])
def test_draws_what_diffusers_draws(pipes, name):
    "Encoded once and batched, or asked by diffusers' own call with the text: the same image"
    pipe, how = pipes[name], Sampling("own", 2, 4.0)
    make, _ = text_maker(pipe, how, bs=2)
    images, rows = make(plan_of([*TEXTS, TEXTS[0]]))
    assert images.dtype == torch.uint8 and images.shape == (4, 3, 64, 64) and len(rows) == 4
    from ltnb.core import generator

    g = generator("text2image", pipe.fingerprint, 0, 0, 3, 2)
    alone = pipe.pipe(TEXTS[2], num_inference_steps=2, guidance_scale=4.0, generator=[g], output_type="pt").images
    assert apart((alone * 255).round().byte()[0], images[2]) <= 1
    assert apart(images[0], images[3]) > 10, "the same prompt, but another item"


def test_items_do_not_depend_on_their_batch(pipes):
    how = Sampling("ddpm", 3, 2.0)  # adds noise at every step
    whole, _ = text_maker(pipes["sd"], how, bs=3)[0](plan_of(TEXTS))
    make, _ = text_maker(pipes["sd"], how, bs=1)
    assert apart(make(plan_of(TEXTS))[0], whole) <= 1
    assert apart(make(plan_of(TEXTS).take([2]))[0][0], whole[2]) <= 1
    for other in (make(plan_of(TEXTS), attempt=1), text_maker(pipes["sd"], how, seed=1)[0](plan_of(TEXTS))):
        assert apart(other[0][2], whole[2]) > 10


def test_words_change_the_image_and_not_the_noise(pipes):
    make, _ = text_maker(pipes["sd"], Sampling("ddim", 1, 1.0))
    images, _ = make(plan_of(TEXTS, ks=[0, 0, 0]))
    assert 0 < apart(images[0], images[1])
    near, far = (images[:2].float() - images[0].float()).abs().mean(), make(plan_of(TEXTS[:1] * 2))[0].float()
    assert near < (far[1] - far[0]).abs().mean() / 2


def test_each_prompt_is_encoded_once(pipes, monkeypatch):
    pipe, seen, read = pipes["sd"].pipe, [], pipes["sd"].pipe.text_encoder.forward
    monkeypatch.setattr(pipe.text_encoder, "forward", lambda ids, **more: seen.append(len(ids)) or read(ids, **more))
    make, _ = text_maker(pipes["sd"], Sampling("ddim", 1, 3.0), bs=2)
    for attempt in (0, 1):
        make(plan_of(TEXTS * 2, ks=list(range(6))), attempt=attempt)
    assert seen == [2, 2, 1, 1], "two prompts of the first batch, one of the second, each beside the empty prompt"
    few = EncodedPrompts(pipe, guided=False, most=2)
    assert len(few(TEXTS)["prompt_embeds"]) == 3 and list(few.known) == TEXTS[1:]


def test_schedulers(pipes):
    sd, lcm = pipes["sd"], pipes["lcm"]
    assert type(scheduler_for(sd, Sampling("dpm++", 5, spacing="karras"))).__name__ == "DPMSolverMultistepScheduler"
    assert scheduler_for(sd, Sampling("dpm++", 5, spacing="karras")).config.use_karras_sigmas
    assert scheduler_for(sd, Sampling("ddim", 5, spacing="trailing")).config.timestep_spacing == "trailing"
    assert scheduler_for(lcm, own_sampling(lcm)) is lcm.scheduler and own_sampling(lcm).sample_steps == 4
    for pipe, how in ((lcm, Sampling("dpm++")), (sd, Sampling("ddim", spacing="karras")), (sd, Sampling("dpm"))):
        with pytest.raises(UsageError):
            text_maker(pipe, how)
    one, two = text_maker(sd, Sampling("own", 2))[0], text_maker(sd, Sampling("dpm++", 2))[0]
    before = one(plan_of(TEXTS[:1]))[0]
    two(plan_of(TEXTS[:1]))
    assert torch.equal(before, one(plan_of(TEXTS[:1]))[0]), "another maker's scheduler stayed in the pipeline"


def test_opening_refuses_what_is_no_text_to_image_pipeline(folders, tmp_path):
    with pytest.raises(UsageError, match="refiner"):
        TextToImage.open(folders["refiner"])
    (tmp_path / "ddpm").mkdir()
    (tmp_path / "ddpm" / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    with pytest.raises(UsageError, match="DDPMPipeline"):
        TextToImage.open(tmp_path / "ddpm")
    shutil.copytree(folders["sd"], tmp_path / "inpaint")
    config = tmp_path / "inpaint" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 9}))
    with pytest.raises(UsageError, match="wants an image"):
        TextToImage.open(tmp_path / "inpaint")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="model_index"):
        TextToImage.open(tmp_path / "empty")
    shutil.copytree(folders["sd"], tmp_path / "torn")
    weights = tmp_path / "torn" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DataError, match="torn"):
        TextToImage.open(tmp_path / "torn")


def test_img2img_folder_of_sd_opens_as_text_to_image(tmp_path):
    pipe = TextToImage.open(saved(tmp_path, stable_diffusion("StableDiffusionImg2ImgPipeline")))
    assert type(pipe.pipe).__name__ == "StableDiffusionPipeline"


def test_hub_ids_are_answered_at_once(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    began = time.monotonic()
    with pytest.raises(UsageError, match="--download"):
        pipeline_folder("nobody/nothing")
    with pytest.raises(UsageError, match="could not be downloaded"):
        pipeline_folder("nobody/nothing", download=True)
    assert time.monotonic() - began < 15
    for path in ("no such folder", "/no/such", "./no/such", "a/b/c"):
        with pytest.raises(UsageError, match="no folder here"):
            pipeline_folder(path, download=True)


def test_fingerprint_follows_the_weights_and_not_the_path(folders, tmp_path):
    shutil.copytree(folders["sd"], tmp_path / "there")
    (tmp_path / "there" / "README.md").write_text("words")
    one, two = (TextToImage.open(p).fingerprint for p in (folders["sd"], tmp_path / "there"))
    other = TextToImage.open(saved(tmp_path / "other", stable_diffusion(checker=True, seed=1)))
    assert one == two != other.fingerprint


def test_bf16_weights(folders):
    pipe = TextToImage.open(folders["sd"], dtype="bf16")
    make, settings = text_maker(pipe, Sampling("ddim", 2, 2.0))
    assert settings["precision"] == "bf16" and make(plan_of(TEXTS))[0].float().std() > 1
    with pytest.raises(UsageError, match="fp16"):
        text_maker(TextToImage.open(folders["sd"], dtype="fp16"))


def test_broken_images_are_drawn_again(pipes, tmp_path, monkeypatch):
    vae, decode, calls = pipes["sd"].pipe.vae, pipes["sd"].pipe.vae.decode, []

    def torn(*a, **more):
        (x,) = decode(*a, **more)
        calls.append(len(x))
        if len(calls) == 1:
            x = x.clone()
            x[1, 0, 0, 0] = float("nan")
        return (x,)

    monkeypatch.setattr(vae, "decode", torn)
    make, settings = text_maker(pipes["sd"], Sampling("ddim", 1, 1.0), size=16)
    made = make_synthetic(tmp_path, plan_of(TEXTS), make, pipes["sd"].fingerprint, settings=settings, attempts=3)
    assert [r["attempt"] for r in made.manifest] == [0, 1, 0] and calls == [3, 1]
    assert made.items[:].float().flatten(1).std(1).min() > 0
    monkeypatch.setattr(vae, "decode", lambda *a, **more: (decode(*a, **more)[0] * float("nan"),))
    with pytest.raises(LtnbError, match="dtype='bf16'"):
        make(plan_of(TEXTS * 2))


def test_the_safety_checker_only_leaves_a_note(pipes, monkeypatch):
    how, (checker, _) = Sampling("ddim", 1, 1.0), pipes["sd"].checker
    images, rows = text_maker(pipes["sd"], how)[0](plan_of(TEXTS))
    assert {type(r["flagged"]) for r in rows} == {bool}
    limits = checker.concept_embeds_weights
    monkeypatch.setattr(limits, "data", torch.full_like(limits, -10))
    again, rows = text_maker(pipes["sd"], how)[0](plan_of(TEXTS))
    assert all(r["flagged"] for r in rows) and torch.equal(images, again)
    assert "flagged" not in text_maker(pipes["xl"], how)[0](plan_of(TEXTS[:1]))[1][0]


def test_bad_prompts(pipes):
    make, _ = text_maker(pipes["sd"], Sampling("ddim", 1, 1.0))
    for prompt, says in (("cat " * 40, "77"), ("", "a prompt is a text"), (None, "a prompt is a text")):
        with pytest.raises(UsageError, match=says):
            make(plan_of([TEXTS[0], prompt]))
    with pytest.raises(UsageError, match="'prompt'"):
        make(np.array([[0, 0]]))
    for more in (dict(bs=0), dict(full_size=60), dict(channels=2), dict(sample_steps=0)):
        with pytest.raises(UsageError):
            text_maker(pipes["sd"], **more)


def test_scores_are_taken_at_full_size_and_not_again(pipes, tmp_path):
    sizes = []

    def bright(images, rows):
        sizes.append((tuple(images.shape[1:]), [r["prompt"] for r in rows]))
        return {"bright": images[:].float().mean((1, 2, 3)).numpy()}

    score = ItemScore("bright", bright, "eye")
    make, settings = text_maker(pipes["sd"], Sampling("ddim", 1, 1.0), size=8, score=score, channels=1)
    plan, wanted = plan_of(TEXTS, c=1), [0, 2]
    drawn = draw_until(
        tmp_path, wanted, make, pipes["sd"].fingerprint, score, lambda r: True, cap=plan, settings=settings
    )
    assert drawn.made.items.shape[1:] == (1, 8, 8) and len(drawn.at) == 2
    assert {s for s, _ in sizes} == {(3, 64, 64)} and sum(len(p) for _, p in sizes) == len(drawn.made)
    assert all(r["scores"]["bright_by"] == "eye" for r in drawn.made.manifest)


def test_drawn_at_another_size(pipes):
    images, _ = text_maker(pipes["sd"], Sampling("ddim", 1, 1.0), full_size=32)[0](plan_of(TEXTS))
    assert images.shape == (3, 3, 32, 32)


def test_shrink():
    board = ((torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255).byte().expand(1, 3, 64, 64)
    assert apart(shrink(board, 8)[..., 1:-1, 1:-1], torch.tensor(128)) < 3
    flat = torch.full((1, 3, 64, 64), 77, dtype=torch.uint8)
    assert (shrink(flat, 8) == 77).all() and torch.equal(shrink(flat), flat)
    assert shrink(flat, 8, 1).shape == (1, 1, 8, 8) and (shrink(flat, 8, 1) == 77).all()
    with pytest.raises(UsageError, match="size=128"):
        shrink(flat, 128)


# the model of the set itself
WORDS = {0: "a dark picture", 1: "a bright picture"}


def untrained():
    "A CLIP of random weights"
    return new_clip(clip_config(8, ClipTraining(layers=1, width=32, embed_dim=16)), 0.5, 0.25, "test")


@pytest.fixture(scope="module")
def clip():
    return untrained()


@pytest.fixture(scope="module")
def tones():
    "One class of dark and bright images: the label says nothing, the caption everything"
    tone = np.arange(64) % 2
    images = np.random.default_rng(0).integers(-20, 20, (64, 1, 8, 8)) + np.where(tone, 200, 55)[:, None, None, None]
    texts = [[WORDS[t], f"{WORDS[t]} of something that takes many more words to say"] for t in tone]
    return SimpleNamespace(images=images.astype(np.uint8), labels=np.zeros(64, np.int64), texts=texts)


def train(tones, clip, **more):
    given = dict(unet="small", n_steps=8, diff_bs=16, class_names=["tone"]) | more
    return train_text_diffusion(tones.images, tones.labels, given.pop("texts", tones.texts), clip, **given)


@pytest.fixture(scope="module")
def model(tones, clip):
    Progress.quiet, UNETS["small"] = True, SMALL
    return train(tones, clip, n_steps=70, diff_lr=4e-3)


def test_states_are_those_of_the_text_tower(clip):
    long = "a handwritten digit three, seen from the left, with two bows"
    (one, two), (alone,) = text_states(clip, ["a cat", long]), text_states(clip, ["a cat"])
    assert len(one) == 4 and torch.allclose(one, alone, atol=1e-5)
    with torch.no_grad():
        z = clip.model.encode_text(clip.tokenizer(["a cat", long]))
        assert torch.allclose(torch.stack([one[-1], two[-1]]) @ clip.model.text_projection, z, atol=1e-4)
    with pytest.raises(UsageError, match="77"):
        text_states(clip, ["cat " * 80])


def test_texts_are_encoded_once_and_the_last_is_the_empty_one(clip, monkeypatch):
    asked, read, known = [], text_diffusion.text_states, {}
    monkeypatch.setattr(text_diffusion, "text_states", lambda c, t, w: asked.extend(t) or read(c, t, w))
    told = ToldTexts(clip, ["a cat", "a dog", "a cat"], known=known)
    ToldTexts(clip, ["a dog", "a cow"], known=known)
    assert asked == ["a cat", "a dog", "", "a cow"]
    assert len(told) == 2 and told.of(["a dog", "a cat", "a dog"]).tolist() == [1, 0, 1]
    assert torch.allclose(told.states[2, :2], read(clip, [""])[0], atol=1e-5) and told.mask.sum(1).tolist() == [4, 4, 2]


def test_captions_are_drawn_step_by_step(tones, clip):
    drawn = Captions(tones.labels, tones.texts, ToldTexts(clip, [t for own in tones.texts for t in own]))
    names, at = list(drawn.told.number), torch.arange(64)
    found = [[names[i] for i in drawn.draw(step, at).tolist()] for step in range(20)]
    assert all(t in own for texts in found for t, own in zip(texts, tones.texts, strict=True))
    assert {t for texts in found for t in texts} == set(names) and len(set(map(tuple, found))) == 20
    assert torch.equal(drawn.draw(3, at), drawn.draw(3, at))


def test_what_a_text_lacks_is_not_read(model):
    "States beyond the end of a text do not count, so a longer neighbour in the table changes nothing"
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([500.0, 20.0])
    told = [ToldTexts(model.clip, [WORDS[0], *more]) for more in ([], [WORDS[1] + " with a great many other words"])]
    with torch.no_grad():
        a, b = (Reader(model.unet, k)(x, t, k.of([WORDS[0]] * 2))[0] for k in told)
        none = Reader(model.unet, told[0])(x, t, torch.tensor([1, 1]))[0]
    assert told[1].states.shape[1] > told[0].states.shape[1] and torch.allclose(a, b, atol=1e-5)
    assert (a - none).abs().max() > 1e-4


def test_words_are_learned_where_labels_say_nothing(model):
    plan = plan_of([WORDS[k % 2] for k in range(16)], c=0)
    images, rows = text_images(model, plan, Sampling("dpm++", 6, 2.0))
    tone = images.float().mean((1, 2, 3))
    assert tone[1::2].mean() - tone[::2].mean() > 80 and rows[0]["guidance_scale"] == 2.0
    same, _ = text_images(model, plan_of([WORDS[0], WORDS[1]], c=0, ks=[5, 5]), Sampling("dpm++", 6, 2.0))
    assert same[1].float().mean() - same[0].float().mean() > 60, "the same noise"


def test_the_text_tower_stays_as_it_is(tones, clip, model):
    assert model.clip.fingerprint == untrained().fingerprint and model.counts.tolist() == [64]


def test_dropped_captions_teach_nothing(tones, clip):
    swapped = [*tones.texts[1:], tones.texts[0]]
    one, two, kept = (
        train(tones, clip, n_steps=3, label_drop=d, texts=t) for d, t in ((1, tones.texts), (1, swapped), (0, swapped))
    )
    assert one.fingerprint != kept.fingerprint
    assert all(
        torch.equal(a, b) for a, b in zip(one.unet.state_dict().values(), two.unet.state_dict().values(), strict=True)
    )


class Stop(Exception):
    "A stand-in for a power cut"


def test_resume_bit_for_bit(tmp_path, tones, clip, monkeypatch):
    monkeypatch.setattr(diffusion, "LOOK_EVERY", 3)  # a checkpoint every three steps

    def run(name, stop_at=None):
        with Run(LDMLRConfig(out=str(tmp_path / name))) as run:
            run.start(LDMLRConfig(), "cpu", "fp32")
            original = run.save

            def save(name, tensors, **meta):
                original(name, tensors, **meta)
                if meta["step"] == stop_at:
                    raise Stop

            run.save = save
            return train(tones, clip, n_steps=5, diff_bs=2, power=0.5, flip=True, run=run, save_every=0)

    with pytest.raises(Stop):
        run("cut", 3)
    one, two = run("cut"), run("whole")
    assert one.fingerprint == two.fingerprint
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_a_folder_that_plain_libraries_open(tmp_path, model):
    import open_clip
    from diffusers import DDIMScheduler, UNet2DConditionModel

    model.save(tmp_path, seed=0)
    again, how, plan = TextDiffusion.load(tmp_path), Sampling("ddim", 10), plan_of([WORDS[1]], c=0)
    ours = text_images(again, plan, how)[0]
    assert again.fingerprint == model.fingerprint and torch.equal(ours, text_images(model, plan, how)[0])
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet").eval()
    scheduler, clip = (
        DDIMScheduler.from_pretrained(tmp_path / "scheduler"),
        open_clip.create_model(f"local-dir:{tmp_path / 'clip'}").eval(),
    )
    from ltnb.jobs import item_noise

    x = item_noise(("text diffusion", model.fingerprint, 0, 0), plan.pairs, (1, 8, 8))
    with torch.no_grad():
        tokens = clip.forward_intermediates(
            text=open_clip.get_tokenizer("ViT-B-32")([WORDS[1]]), normalize_intermediates=True
        )["text_intermediates"][-1]
        states = tokens[:, : int(open_clip.get_tokenizer("ViT-B-32")([WORDS[1]]).argmax()) + 1]
        scheduler.set_timesteps(10)
        for t in scheduler.timesteps:
            p = unet(x, t, encoder_hidden_states=states).sample
            x = scheduler.step(p, t, x, use_clipped_model_output=True).prev_sample
    theirs = ((x + 1) * 127.5).round().clamp(0, 255).byte()
    assert apart(ours, theirs) <= 2


def test_folders_that_are_refused(tmp_path, model, tones):
    with pytest.raises(DataError):
        TextDiffusion.load(tmp_path)
    model.save(tmp_path / "m")
    with pytest.raises(UsageError, match="TextDiffusion.load"):
        pipeline_folder(tmp_path / "m")
    about = json.loads((tmp_path / "m" / "ltnb.json").read_text())
    (tmp_path / "m" / "ltnb.json").write_text(json.dumps(about | {"fingerprint": "0"}))
    with pytest.raises(DataError, match="damaged"):
        TextDiffusion.load(tmp_path / "m")
    train_diffusion(tones.images, tones.labels, 1, unet="small", n_steps=1, diff_bs=2).save(tmp_path / "labels")
    with pytest.raises(DataError, match="not texts"):
        TextDiffusion.load(tmp_path / "labels")


def test_what_cannot_be_trained(tones, clip):
    for texts, says in ((tones.texts[:3], "64 lists"), (["a cat"] * 64, "list of texts"), ([[]] * 64, "at least one")):
        with pytest.raises(DataError, match=says):
            train(tones, clip, texts=texts)
    with pytest.raises(UsageError, match="Did you mean 'tiny'"):
        train(tones, clip, unet="tini")
    with pytest.raises(UsageError, match="77"):
        train(tones, clip, texts=[["cat " * 100]] * 64)


def test_as_a_job(tmp_path, model):
    make, settings = text_image_maker(model, Sampling("dpm++", 3, 1.5), seed=0)
    plan = plan_of([WORDS[k % 2] for k in range(6)], c=0)
    job = dict(settings=settings, shard_size=2, attempts=2)
    made = make_synthetic(tmp_path / "a", plan, make, model.fingerprint, **job)
    assert [r["prompt"] for r in made.manifest] == plan["prompt"].tolist() and settings["spacing"] == "karras"
    assert made.manifest[0]["sample_steps"] == 3
    alone, _ = make(plan.take([4]))
    assert apart(alone[0], torch.as_tensor(np.asarray(made.items[4]))) <= 1
    assert apart(make(plan.take([4]), attempt=1)[0], alone) > 5
    with pytest.raises(UsageError, match="'prompt'"):
        make(plan.pairs)
    with pytest.raises(UsageError, match="knows 1"):
        make(plan_of(["a"], c=1))
