"Diffusers pipelines of the usual classes with tiny random weights, built offline: the layout is real, the pictures are noise."
import json
import tempfile
from pathlib import Path

import torch

WORDS = ["a", "an", "photo", "of", "smiling", "male", "female", "young", "with", "glasses", "hat", "portrait", ",", "."]
_SMALL = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


def clip_tokenizer(length=16):
    "A CLIP tokenizer of a handful of words and all bytes."
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    characters = sorted(ByteLevel.alphabet())
    words = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=length)


def text_encoder(tokenizer, projection=None):
    "A CLIP text encoder for it; with a projection where a dimension is given."
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id)
    config = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length, **_SMALL, **ends,
                            projection_dim=projection or 16)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5():
    "A T5 tokenizer and encoder."
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}, unk_token="<unk>"))
    inner.normalizer, inner.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    return tokenizer, T5EncoderModel(config).eval()


def autoencoder(channels=4, **options):
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                         latent_channels=channels, norm_num_groups=4, sample_size=16, **options).eval()


def _unet(**options):
    from diffusers import UNet2DConditionModel

    blocks = dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    small = dict(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    return UNet2DConditionModel(**small, **blocks, **options).eval()


def stable_diffusion(safety_checker=None):
    "Stable Diffusion 2.1: CLIP text, v-prediction, DDIM."
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    tokenizer = clip_tokenizer()
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
                              beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return StableDiffusionPipeline(vae=autoencoder(), text_encoder=text_encoder(tokenizer), tokenizer=tokenizer,
                                   unet=_unet(cross_attention_dim=16, attention_head_dim=(2, 4), use_linear_projection=True),
                                   scheduler=scheduler, safety_checker=safety_checker, feature_extractor=None,
                                   requires_safety_checker=False)


def stable_diffusion_xl():
    "Stable Diffusion XL: two CLIP encoders, size and crop as conditions."
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    tokenizer, second = clip_tokenizer(), clip_tokenizer()
    unet = _unet(cross_attention_dim=32, attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
                 addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16, transformer_layers_per_block=(1, 1))
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="leading")
    return StableDiffusionXLPipeline(vae=autoencoder(), text_encoder=text_encoder(tokenizer), text_encoder_2=text_encoder(second, 16),
                                     tokenizer=tokenizer, tokenizer_2=second, unet=unet, scheduler=scheduler, add_watermarker=False)


def stable_diffusion_3():
    "Stable Diffusion 3: two CLIP encoders, T5, a transformer, flow matching."
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizer, second, (third, t5_encoder) = clip_tokenizer(), clip_tokenizer(), t5()
    transformer = SD3Transformer2DModel(sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
                                        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32,
                                        pooled_projection_dim=32).eval()
    return StableDiffusion3Pipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
                                    vae=autoencoder(shift_factor=0.06, scaling_factor=1.5), text_encoder=text_encoder(tokenizer, 16),
                                    tokenizer=tokenizer, text_encoder_2=text_encoder(second, 16), tokenizer_2=second,
                                    text_encoder_3=t5_encoder, tokenizer_3=third)


def flux():
    "FLUX: CLIP for the pooled text, T5 for its words, latents packed in twos."
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tokenizer, (second, t5_encoder) = clip_tokenizer(), t5()
    transformer = FluxTransformer2DModel(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
                                         num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16,
                                         axes_dims_rope=(4, 4, 8)).eval()
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), vae=autoencoder(shift_factor=0.06, scaling_factor=1.5),
                        text_encoder=text_encoder(tokenizer), tokenizer=tokenizer, text_encoder_2=t5_encoder, tokenizer_2=second,
                        transformer=transformer)


LAYOUTS = {"StableDiffusionPipeline": stable_diffusion, "StableDiffusionXLPipeline": stable_diffusion_xl,
           "StableDiffusion3Pipeline": stable_diffusion_3, "FluxPipeline": flux}
SIZES = {"FluxPipeline": 16}  # the default of the class is too large for a test


def clip_model():
    "CLIP with random weights and its processor."
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = clip_tokenizer(length=24)
    text = {**_SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 24, "eos_token_id": tokenizer.eos_token_id}
    vision = {**_SMALL, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return model, CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def save(build, folder, seed=0):
    "Build with weights of this seed, and save in the layout of `from_pretrained`."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        build().save_pretrained(folder)
    return folder
