"""GPT-OSS with multi-head latent attention in the layers that the configuration lists.

A converted layer caches for each token a latent of `r = kv_lora_rank` numbers and one rotated key of
`d_r = qk_rope_head_dim` numbers, both shared by all heads, in place of keys and values. Everything else, the experts,
norms, unconverted layers and caches, is transformers' own. Written for transformers 5.

Letters in shapes: B texts, T tokens of this call, S tokens attended (cached ones first), H heads, d numbers in a query
head, d_v in a head's value, D in a hidden state.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssAttention,
    GptOssForCausalLM,
    GptOssModel,
    GptOssPreTrainedModel,
    apply_rotary_pos_emb,
)

from .configuration_gpt_oss_mla import GptOssMlaConfig


class HeadMatrices(nn.Module):
    """A matrix for each head, stored one below the other; called, so that offloaded weights are fetched."""

    def __init__(self, heads: int, rows: int, columns: int):
        super().__init__()
        self.shape = (heads, rows, columns)
        self.weight = nn.Parameter(torch.empty(heads * rows, columns))

    def forward(self) -> torch.Tensor:
        """[heads, rows, columns]"""
        return self.weight.view(self.shape)


def times_own(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x [B, H, T, n] times y [H, n, m]: [B, H, T, m], without a copy of y for every text."""
    return torch.einsum("bhtn,hnm->bhtm", x, y)


def times_shared(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x [B, H, T, n] times y [B, 1, n, m]: [B, H, T, m], without a copy of y for every head."""
    return (x.flatten(1, 2) @ y.squeeze(1)).unflatten(1, x.shape[1:3])


class GptOssMlaAttention(GptOssAttention):
    """Latent attention with GPT-OSS's queries, sinks and window.

    score_h = attention_scale * (q_h . W_UK,h c + rotate(W_QR,h q_h) . k), value_h = W_UV,h c, with the latent c and the
    rotated key k of a token; q_h is the query as GPT-OSS projects it, before any rotation.
    """

    def __init__(self, config: GptOssMlaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        del self.k_proj, self.v_proj
        self.latent_dim, self.rotary_dim, self.nope_dim, self.value_dim = (
            config.mla_size(key, layer_idx)
            for key in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        )
        heads = config.num_attention_heads
        self.scaling = config.attention_scale
        self.q_rope_proj = HeadMatrices(heads, self.rotary_dim, self.head_dim)
        self.kv_a_proj_with_mqa = nn.Linear(
            config.hidden_size, self.latent_dim + self.rotary_dim, bias=config.attention_bias
        )
        self.kv_b_proj = HeadMatrices(heads, self.nope_dim + self.value_dim, self.latent_dim)
        self.o_proj = nn.Linear(heads * self.value_dim, config.hidden_size, bias=config.mla_o_bias)
        self.register_buffer("rotary_inv_freq", torch.zeros(self.rotary_dim // 2, dtype=torch.float32))

    def _apply(self, fn, recurse=True):
        # The angles of late tokens need all bits of the frequencies, whatever type the weights are cast to.
        frequencies = self.rotary_inv_freq
        super()._apply(fn, recurse)
        if not frequencies.is_meta:
            self.rotary_inv_freq = frequencies.to(self.rotary_inv_freq.device)
        return self

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [B, T, D] to the layer's output [B, T, D] and its probabilities [B, H, T, S].

        position_ids: [B, T]; attention_mask: [B, 1, T, S], added to the scores, the window of a sliding layer in it.
        """
        batch, tokens, _ = hidden_states.shape
        query = self.q_proj(hidden_states).view(batch, tokens, -1, self.head_dim).transpose(1, 2)
        row = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1)
        latent, rotary_key = row.split([self.latent_dim, self.rotary_dim], dim=-1)
        rotary_query = times_own(query, self.q_rope_proj().mT)
        angle = position_ids[..., None].float() * self.rotary_inv_freq
        cos, sin = angle.cos().to(query.dtype), angle.sin().to(query.dtype)
        rotary_query, rotary_key = apply_rotary_pos_emb(rotary_query, rotary_key, cos, sin)
        if past_key_values is not None:
            # As keys and values of one head: [B, 1, S, r] and [B, 1, S, d_r].
            latent, rotary_key = past_key_values.update(latent, rotary_key, self.layer_idx)

        decoder = self.kv_b_proj()
        absorbed = self.absorbed_is_cheaper(tokens, latent.shape[2])
        if absorbed:
            w_uk, w_uv = decoder.split([self.nope_dim, self.value_dim], dim=1)
            scores = times_shared(times_own(query, w_uk), latent.mT)
        else:
            heads = (latent.squeeze(1) @ decoder.flatten(0, 1).mT).unflatten(-1, decoder.shape[:2]).transpose(1, 2)
            key, value = heads.split([self.nope_dim, self.value_dim], dim=-1)
            scores = query @ key.mT
        scores = (scores + times_shared(rotary_query, rotary_key.mT)) * self.scaling
        if attention_mask is not None:
            scores = scores + attention_mask
        sinks = self.sinks.view(1, -1, 1, 1).expand(batch, -1, tokens, 1).to(scores.dtype)
        probabilities = torch.cat([scores, sinks], dim=-1).softmax(dim=-1, dtype=torch.float32)
        probabilities = probabilities[..., :-1].to(query.dtype)
        weights = nn.functional.dropout(probabilities, self.attention_dropout, self.training)
        output = times_own(times_shared(weights, latent), w_uv.mT) if absorbed else weights @ value
        return self.o_proj(output.transpose(1, 2).flatten(2)), probabilities

    def absorbed_is_cheaper(self, tokens: int, attended: int) -> bool:
        """Whether attending in the latent space takes fewer multiplications than decoding keys and values first."""
        wide = self.nope_dim + self.value_dim
        in_latent_space = tokens * self.latent_dim * (wide + 2 * attended)
        in_head_space = attended * wide * (self.latent_dim + tokens)
        return in_latent_space <= in_head_space


class GptOssMlaPreTrainedModel(GptOssPreTrainedModel):
    config_class = GptOssMlaConfig
    # Attention is computed here, on a mask of numbers.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    _compatible_flash_implementations = None
    _keep_in_fp32_modules_strict = ["rotary_inv_freq"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HeadMatrices):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)


class GptOssMlaModel(GptOssMlaPreTrainedModel, GptOssModel):
    """`GptOssModel` with the attention of the listed layers exchanged."""

    def __init__(self, config: GptOssMlaConfig):
        super().__init__(config)
        for layer_idx in config.mla_layers:
            self.layers[layer_idx].self_attn = GptOssMlaAttention(config, layer_idx)
        self.post_init()


class GptOssMlaForCausalLM(GptOssMlaPreTrainedModel, GptOssForCausalLM):
    """`GptOssForCausalLM` on a `GptOssMlaModel`."""

    def __init__(self, config: GptOssMlaConfig):
        super().__init__(config)
        self.model = GptOssMlaModel(config)
        self.post_init()
