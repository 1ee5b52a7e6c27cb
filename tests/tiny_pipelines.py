"Pipelines of diffusers with a few hundred thousand random weights, built from their configs: nothing is downloaded"

from pathlib import Path

import torch

WORDS = 514  # 256 bytes, 256 bytes that end a word, start and end of a text


def _tokenizer():
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(x + "</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)


def _text_encoder(projected=False, width=32):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=WORDS,
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=width,
        bos_token_id=WORDS - 2,
        eos_token_id=WORDS - 1,
        pad_token_id=WORDS - 1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _unet(cross, **more):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross,
        attention_head_dim=4,
        norm_num_groups=8,
        **more,
    )


def _vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),  # four, so that an image of 64 pixels has 8 x 8 latents
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def _scheduler(kind="DDIMScheduler", **more):
    import diffusers

    known = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
    if kind == "DDIMScheduler":
        known |= dict(clip_sample=False, set_alpha_to_one=False)
    return getattr(diffusers, kind)(**known, **more)


def _checker():
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision = dict(small, image_size=32, patch_size=16)
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, text_config=small, projection_dim=8))
    looks = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return dict(safety_checker=checker, feature_extractor=looks)


def stable_diffusion(kind="StableDiffusionPipeline", checker=False, seed=0, **more):
    "A pipeline like Stable Diffusion 1: one text encoder; `kind` may be its image-to-image class, or that of LCM"
    import diffusers

    lcm = kind == "LatentConsistencyModelPipeline"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = dict(vae=_vae(), text_encoder=_text_encoder(), tokenizer=_tokenizer())
        parts |= dict(unet=_unet(32, **(dict(time_cond_proj_dim=16) if lcm else {})))
        parts |= dict(scheduler=_scheduler("LCMScheduler" if lcm else "DDIMScheduler"))
        parts |= _checker() if checker else dict(safety_checker=None, feature_extractor=None)
    return getattr(diffusers, kind)(**parts, requires_safety_checker=checker, **more)


def stable_diffusion_xl(refiner=False, seed=0):
    "A pipeline like SDXL, with two text encoders, or like its refiner, with the second of them alone"
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        told = dict(addition_embed_type="text_time", addition_time_embed_dim=8, use_linear_projection=True)
        told |= dict(projection_class_embeddings_input_dim=32 + (5 if refiner else 6) * 8)
        unet = _unet(32 if refiner else 64, transformer_layers_per_block=1, **told)
        one = dict(text_encoder=None, tokenizer=None)
        if not refiner:
            one = dict(text_encoder=_text_encoder(), tokenizer=_tokenizer())
        two = dict(text_encoder_2=_text_encoder(projected=True), tokenizer_2=_tokenizer())
        parts = dict(vae=_vae(), unet=unet, scheduler=_scheduler("EulerDiscreteScheduler"), **one, **two)
    if refiner:
        return diffusers.StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True)
    return diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)


def saved(folder, pipe):
    "The folder, with the pipeline in it"
    pipe.save_pretrained(folder)
    return Path(folder)
