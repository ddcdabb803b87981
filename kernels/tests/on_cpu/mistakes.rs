//! Deliberate mistakes in the attention's sources, each of which must be noticed.

use mlac_kernels::config::AttentionConfig;
use mlac_kernels::problem::{Problem, compare};
use mlac_kernels::{Arch, AttentionDesc};

use crate::common::Edit;
use crate::machine::{compile, run};
use crate::{e4m3, sinks};

/// Each of these edits of the sources must be noticed: by a wrong answer, or because somebody waits for ever.
#[test]
fn mistakes_in_the_sources_are_noticed() {
    let latent = sinks(AttentionDesc::latent(64, 64, 64, Arch::Sm90a));
    let mma = sinks(AttentionDesc::latent(32, 64, 64, Arch::Sm80));
    let gqa = sinks(AttentionDesc::grouped(16, 2, 64, Arch::Sm80));
    let wgmma = sinks(AttentionDesc::grouped(16, 2, 64, Arch::Sm90a));
    let fp8 = e4m3(latent);
    let fp8_mma = e4m3(mma);
    let shared = sinks(AttentionDesc::latent(64, 320, 64, Arch::Sm90a));
    let edits: [(&str, AttentionDesc, Edit); 17] = [
        (
            "a phase of the ring",
            latent,
            (
                "sm90_load.cuh",
                "(count / kStages & 1) ^ 1",
                "(count / kStages & 1)",
            ),
        ),
        (
            "a stage given back before its values are read",
            latent,
            (
                "mla_sm90.cuh",
                "        wgmma_wait<0>();\n        pin(o);",
                "",
            ),
        ),
        (
            "rows beyond the request left as they are",
            latent,
            ("sm90_tiles.cuh", "start + kTile > piece.length", "false"),
        ),
        (
            "queries that come too early",
            latent,
            (
                "mla_sm90.cuh",
                "    barrier_wait(empty, parity);\n    parity ^= 1;",
                "    parity ^= 1;",
            ),
        ),
        (
            "values by the wrong rows",
            latent,
            ("mla_sm90.cuh", "tile + k * 2048", "tile + k * 1024"),
        ),
        (
            "a merge that forgets a warpgroup's scale",
            latent,
            (
                "sm90_output.cuh",
                "exchange[i * 128 + thread] * other[r]",
                "exchange[i * 128 + thread] * own[r]",
            ),
        ),
        (
            "a sink in every piece",
            latent,
            (
                "sm90_output.cuh",
                "    if (piece.slot >= 0) {\n      if (store) p.lse_part[slot_row + row + 8 * r] = lse;\n    } else if",
                "    if (piece.slot >= 0) {\n      if (store) p.lse_part[slot_row + row + 8 * r] = lse;\n      if (kSinks) denominator += exp2_fast(p.sinks[head] * kLog2e - top);\n    } else if",
            ),
        ),
        (
            "a tile that is not waited for",
            mma,
            (
                "mla_mma.cuh",
                "copy_wait<kStages - 2>();",
                "copy_wait<kStages - 1>();",
            ),
        ),
        (
            "maxima of rows, and rotated keys, that are not waited for",
            shared,
            (
                "mla_sm90.cuh",
                "keys are done with.\n  named_barrier<3, kConsumers>();\n",
                "keys are done with.\n",
            ),
        ),
        (
            "weights of the other warpgroup that are not waited for",
            shared,
            (
                "mla_sm90.cuh",
                "  fence_async_proxy();\n  named_barrier<4, kConsumers>();\n",
                "  fence_async_proxy();\n",
            ),
        ),
        (
            "sums of the other warpgroup that are not waited for",
            shared,
            (
                "mla_sm90.cuh",
                "    named_barrier<5, kConsumers>();\n    sum[0]",
                "    sum[0]",
            ),
        ),
        (
            "a page given back before it is converted",
            fp8,
            (
                "sm90_fp8.cuh",
                "  if (kBuffers == 1) converters_barrier(ring.group);\n",
                "  if (kBuffers == 1) converters_barrier(ring.group);\n  if (ring.lane == 0) barrier_arrive(ring.empty + 8 * stage);\n",
            ),
        ),
        (
            "weights without their token's scale",
            fp8,
            ("sm90_fp8.cuh", "= x * of.x;", "= x;"),
        ),
        (
            "a tile multiplied before all of it is converted",
            fp8_mma,
            (
                "mla_mma.cuh",
                "      if (i == 0) convert_queries(memory);\n      __syncthreads();\n",
                "      if (i == 0) convert_queries(memory);\n",
            ),
        ),
        (
            "codes widened to another power of two",
            fp8_mma,
            ("fp8.cuh", "0x5c005c00", "0x58005800"),
        ),
        (
            "values beyond the request left as they are",
            wgmma,
            ("gqa_sm90.cuh", "if (valid < kTile) {", "if (false) {"),
        ),
        (
            "a ring overwritten too early",
            gqa,
            (
                "gqa_mma.cuh",
                "(i + kStages - 1) % kStages",
                "(i + kStages) % kStages",
            ),
        ),
    ];
    for (name, desc, edit) in edits {
        let mut config = AttentionConfig::choose(&desc).unwrap();
        config.min_split = 1;
        config.stages = config.stages.min(3);
        let folder = tempfile::tempdir().unwrap();
        compile(&desc, &config, folder.path(), Some(edit));
        let problem = Problem::random(desc, &[1000, 70, 130], 5);
        let reference = problem.reference();
        // Whoever runs ahead: nobody, the loading warpgroup, either of the computing ones.
        let noticed = (0..4).any(
            |seed| match run(&problem, &config, 2, seed, folder.path()) {
                Err(_) => true,
                Ok((answer, _)) => compare(&answer, &reference).complaint(&problem).is_some(),
            },
        );
        assert!(noticed, "{name} went unnoticed");
    }
}
