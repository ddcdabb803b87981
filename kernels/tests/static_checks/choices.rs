//! What a request becomes, and what is refused, as texts.

use mlac_kernels::config::AttentionConfig;
use mlac_kernels::{Arch, Attention, AttentionDesc, Mask, Source};

use super::{e4m3, gpt_oss};

#[test]
fn requests_choices_and_prologues() {
    let hopper = gpt_oss(192, Arch::Sm90a);
    let mut text = String::new();
    for desc in [
        gpt_oss(128, Arch::Sm90a),
        hopper,
        gpt_oss(256, Arch::Sm90a),
        gpt_oss(512, Arch::Sm90a),
        AttentionDesc {
            query_tokens: 4,
            mask: Mask::Tree,
            ..hopper
        },
        AttentionDesc {
            window: Some(128),
            ..hopper
        },
        gpt_oss(512, Arch::Sm80),
        gpt_oss(512, Arch::Sm89),
        gpt_oss(192, Arch::Sm120),
        AttentionDesc::latent(9, 192, 96, Arch::Sm86),
        AttentionDesc {
            sinks: true,
            ..AttentionDesc::grouped(64, 8, 64, Arch::Sm90a)
        },
        AttentionDesc::grouped(64, 8, 64, Arch::Sm89),
        e4m3(hopper),
        e4m3(gpt_oss(512, Arch::Sm90a)),
        AttentionDesc {
            query_tokens: 4,
            ..e4m3(hopper)
        },
        e4m3(gpt_oss(512, Arch::Sm89)),
    ] {
        let config = AttentionConfig::choose(&desc).unwrap();
        text.push_str(&format!("{desc}\n{}\n{config}\n\n", desc.slug()));
    }
    insta::assert_snapshot!("choices", text);
    let config = AttentionConfig::choose(&hopper).unwrap();
    insta::assert_snapshot!("source", Source::of(&hopper, &config).text);
}

#[test]
fn what_no_kernel_computes_is_refused() {
    let base = AttentionDesc::latent(64, 192, 64, Arch::Sm90a);
    let rank = |kv_lora_rank, rope_dim| AttentionDesc {
        attention: Attention::Latent {
            kv_lora_rank,
            rope_dim,
        },
        ..base
    };
    let mut text = String::new();
    for desc in [
        rank(100, 64),
        rank(576, 64),
        rank(192, 24),
        AttentionDesc { page: 16, ..base },
        AttentionDesc {
            query_heads: 0,
            ..base
        },
        AttentionDesc {
            query_heads: 129,
            ..base
        },
        AttentionDesc {
            query_tokens: 17,
            ..base
        },
        AttentionDesc {
            window: Some(0),
            ..base
        },
        AttentionDesc {
            window: Some(32),
            mask: Mask::Tree,
            ..base
        },
        AttentionDesc::grouped(64, 7, 64, Arch::Sm90a),
        AttentionDesc::grouped(64, 8, 80, Arch::Sm90a),
        AttentionDesc {
            query_tokens: 16,
            ..AttentionDesc::grouped(64, 8, 64, Arch::Sm90a)
        },
        AttentionDesc {
            query_tokens: 5,
            ..AttentionDesc::grouped(64, 8, 64, Arch::Sm80)
        },
        e4m3(AttentionDesc::grouped(64, 8, 64, Arch::Sm90a)),
    ] {
        text.push_str(&format!(
            "{}\n",
            AttentionConfig::choose(&desc).unwrap_err()
        ));
    }
    insta::assert_snapshot!(text);
}
