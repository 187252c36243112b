"""The shape of the tiny base."""

from transformers import Qwen2_5_VLConfig

TINY_HIDDEN, TINY_VISION_HIDDEN = 256, 128


def tiny_config(vocab_size: int, hidden: int = TINY_HIDDEN, layers: int = 5,
                vision_hidden: int = TINY_VISION_HIDDEN,
                vision_layers: int = 4) -> Qwen2_5_VLConfig:
    """The tiny Qwen2.5-VL. Widths are multiples of 64, the block size of NF4; heads are 32 wide."""
    heads = hidden // 32
    text_config = dict(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=-(-hidden * 11 // 256) * 64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0,
                         "mrope_section": [4, 6, 6]},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0)
    vision_config = dict(
        depth=vision_layers,
        hidden_size=vision_hidden,
        intermediate_size=vision_hidden * 2,
        num_heads=vision_hidden // 32,
        out_hidden_size=hidden,
        fullatt_block_indexes=list(range(vision_layers)))
    return Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
        tie_word_embeddings=True)
