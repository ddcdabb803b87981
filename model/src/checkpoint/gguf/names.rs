//! Tensor names of llama.cpp as those of Hugging Face, and the row order of rotary projections.

/// The Hugging Face name of a GGUF tensor; `None` for one that mlac does not know.
pub(super) fn hugging_face(name: &str) -> Option<String> {
    match name {
        "token_embd.weight" => return Some("model.embed_tokens.weight".into()),
        "output_norm.weight" => return Some("model.norm.weight".into()),
        "output.weight" => return Some("lm_head.weight".into()),
        _ => {}
    }
    let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
    let canonical = layer
        .parse::<usize>()
        .is_ok_and(|number| number.to_string() == layer);
    let (module, kind) = part.rsplit_once('.')?;
    let module = match module {
        "attn_norm" => "input_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    (canonical && matches!(kind, "weight" | "bias"))
        .then(|| format!("model.layers.{layer}.{module}.{kind}"))
}

/// Whether llama.cpp's converter permutes the rows of this tensor for architecture `llama`: it
/// stores pairs of the rotation side by side, Hugging Face stores first halves, then second halves.
pub(super) fn is_permuted(hf_name: &str) -> bool {
    [
        "q_proj.weight",
        "q_proj.bias",
        "k_proj.weight",
        "k_proj.bias",
    ]
    .iter()
    .any(|suffix| hf_name.ends_with(suffix))
}

/// Undoes the permutation. `bytes` holds rows of `row` bytes, heads of `head_dim` rows: row `2j + p`
/// of a head goes to row `p * head_dim / 2 + j`.
pub(super) fn unpermute(bytes: &[u8], row: usize, head_dim: usize) -> Vec<u8> {
    let mut ordered = Vec::with_capacity(bytes.len());
    for head in bytes.chunks_exact(row * head_dim) {
        for half in 0..2 {
            for pair in 0..head_dim / 2 {
                let at = (2 * pair + half) * row;
                ordered.extend_from_slice(&head[at..at + row]);
            }
        }
    }
    ordered
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_mapped_or_unknown() {
        let hf = |name| hugging_face(name).unwrap();
        assert_eq!(
            hf("blk.12.attn_q.bias"),
            "model.layers.12.self_attn.q_proj.bias"
        );
        assert_eq!(
            hf("blk.0.ffn_down.weight"),
            "model.layers.0.mlp.down_proj.weight"
        );
        for unknown in [
            "blk.0.ffn_gate_exps.weight",
            "blk.01.attn_q.weight",
            "blk.attn_q.weight",
            "rope_freqs.weight",
            "blk.0.attn_q.scale",
        ] {
            assert_eq!(hugging_face(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn rows_go_back_to_half_split_order() {
        // Two heads of four rows, one byte each, as llama.cpp stores them: 0 2 1 3 in its words is
        // (pair 0: rows 0 and 2), (pair 1: rows 1 and 3).
        let stored = [0, 2, 1, 3, 10, 12, 11, 13];
        assert_eq!(unpermute(&stored, 1, 4), [0, 1, 2, 3, 10, 11, 12, 13]);
        let two_bytes = [0, 0, 2, 2, 1, 1, 3, 3];
        assert_eq!(unpermute(&two_bytes, 2, 4), [0, 0, 1, 1, 2, 2, 3, 3]);
    }
}
