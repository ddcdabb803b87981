"""Configuration of GPT-OSS with multi-head latent attention in some or all layers, as mlac writes it."""

from transformers import GptOssConfig


class GptOssMlaConfig(GptOssConfig):
    """A `GptOssConfig` and what the converted layers need besides.

    mla_layers: the layers with latent attention, rising; all others are as in GPT-OSS.
    kv_lora_rank, qk_rope_head_dim: numbers in the latent and in the rotary key that are cached for a token.
    qk_nope_head_dim, v_head_dim: numbers in a query head and in a head's value.
    attention_scale: factor on the scores of converted layers.
    mla_o_bias: whether the output projection of converted layers has a bias.

    Each of the four sizes is one number, or a list parallel to `mla_layers`.
    """

    model_type = "gpt_oss_mla"

    mla_layers: list[int] | None = None
    mla_encoder: str = "kept_query"
    kv_lora_rank: int | list[int] = 448
    qk_rope_head_dim: int | list[int] = 64
    qk_nope_head_dim: int | list[int] = 64
    v_head_dim: int | list[int] = 64
    attention_scale: float = 0.125
    mla_o_bias: bool = True

    def __post_init__(self, **kwargs):
        self.mla_layers = self.mla_layers or []
        if self.mla_encoder != "kept_query":
            raise ValueError(f"mla_encoder: expected 'kept_query', found {self.mla_encoder!r}")
        for key in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"):
            value = getattr(self, key)
            if isinstance(value, list) and len(value) != len(self.mla_layers):
                raise ValueError(f"{key}: expected {len(self.mla_layers)} numbers as in mla_layers, found {len(value)}")
        super().__post_init__(**kwargs)

    def mla_size(self, key: str, layer_idx: int) -> int:
        """The size called `key` of a converted layer."""
        value = getattr(self, key)
        return value[self.mla_layers.index(layer_idx)] if isinstance(value, list) else value
