use std::fs;
use std::path::Path;

use mlac_model::{Checkpoint, CheckpointWriter, ModelConfig, mxfp4};

use super::layout::Sizes;
use super::{bytes_of, make, parse, tokenizer};

/// A model of a few kilobytes in several shards.
const TINY: Sizes = Sizes {
    layers: 11,
    hidden: 64,
    intermediate: 32,
    heads: 4,
    kv_heads: 2,
    head_dim: 16,
    experts: 4,
    vocab: tokenizer::ORDINARY + 40,
    first_special: tokenizer::ORDINARY + 5,
    max_shard: 300_000,
};

fn make_tiny(seed: u64, output: &Path) {
    make(&TINY, TINY.shards().unwrap(), seed, output, &mut |_| ()).unwrap();
}

/// The lengths of the published files (their Git LFS pointers and indexes say them).
#[test]
fn full_sizes_are_the_published_ones() {
    let small = Sizes::SMALL.shards().unwrap();
    assert_eq!(bytes_of(&small).unwrap(), 13_761_264_768);
    let names: Vec<&str> = small.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        names,
        [
            "model-00000-of-00002.safetensors",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        ]
    );
    let holder = |tensor: &str| {
        small
            .iter()
            .position(|(_, tensors)| tensors.iter().any(|info| info.name == tensor))
    };
    // Where the published index changes from shard to shard.
    for (tensor, shard) in [
        ("model.layers.18.self_attn.v_proj.bias", 0),
        ("model.layers.18.self_attn.q_proj.weight", 1),
        ("model.layers.6.mlp.experts.gate_up_proj_bias", 1),
        ("model.layers.6.mlp.experts.gate_up_proj_blocks", 2),
        ("lm_head.weight", 2),
    ] {
        assert_eq!(holder(tensor), Some(shard), "{tensor}");
    }
    // To the byte, but for an entry `__metadata__` (32 bytes with padding) that the published files
    // lack and transformers asks for. Nothing is written but the headers.
    let around = tempfile::tempdir().unwrap();
    let writer = CheckpointWriter::create_shards(&around.path().join("m"), small).unwrap();
    let lengths = ["00000", "00001", "00002"].map(|at| {
        let name = format!("m.partial/model-{at}-of-00002.safetensors");
        fs::metadata(around.path().join(name)).unwrap().len() - 32
    });
    drop(writer);
    assert_eq!(lengths, [4_792_272_488, 4_798_702_184, 4_170_342_232]);

    let large = Sizes::LARGE.shards().unwrap();
    assert_eq!(bytes_of(&large).unwrap(), 65_248_815_744);
    assert_eq!(large.len(), 15);
    assert_eq!(large[14].0, "model-00014-of-00014.safetensors");
}

#[test]
fn a_small_one_is_complete_and_opens() {
    let around = tempfile::tempdir().unwrap();
    let folder = around.path().join("model");
    make_tiny(1, &folder);
    let shards = TINY.shards().unwrap();
    assert!(shards.len() > 1);
    assert!(shards.iter().all(|(name, _)| folder.join(name).is_file()));
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let config: &ModelConfig = checkpoint.config();
    assert!(config.sinks);
    let moe = config.moe.unwrap();
    assert_eq!((moe.num_experts, moe.experts_per_token), (4, 4));
    assert_eq!(config.sliding_window[..2], [Some(128), None]);
    assert_eq!(checkpoint.side_files().len(), 4);

    let tokenizer = checkpoint.tokenizer().unwrap();
    let special = TINY.first_special as u32;
    let ids = tokenizer
        .encode("<|start|>user<|message|> and the bee<|end|>")
        .unwrap();
    // u, s, er; " and"; " the"; " ", b, e, e.
    assert_eq!(ids[0], special + 8);
    assert_eq!(
        ids[1..],
        [
            117,
            115,
            263,
            special + 10,
            266,
            262,
            32,
            98,
            101,
            101,
            special + 9
        ]
    );
    assert_eq!(
        tokenizer.decode(&ids).unwrap(),
        "<|start|>user<|message|> and the bee<|end|>"
    );
    assert!(config.eos_token_ids.contains(&(special + 14)));
}

#[test]
fn numbers_are_plausible_and_finite() {
    let around = tempfile::tempdir().unwrap();
    let folder = around.path().join("model");
    make_tiny(7, &folder);
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let spread = |numbers: &[f32]| {
        let mean = numbers.iter().sum::<f32>() / numbers.len() as f32;
        let squares: f32 = numbers.iter().map(|x| (x - mean) * (x - mean)).sum();
        (mean, (squares / numbers.len() as f32).sqrt())
    };
    let name = "model.embed_tokens.weight";
    let (mean, deviation) = spread(&checkpoint.f32(name, &[TINY.vocab, 64]).unwrap());
    assert!(mean.abs() < 0.03 && (deviation - 1.0).abs() < 0.03);
    let name = "model.layers.3.self_attn.q_proj.weight";
    let (mean, deviation) = spread(&checkpoint.f32(name, &[64, 64]).unwrap());
    assert!(mean.abs() < 0.01 && (deviation - 0.125).abs() < 0.01);

    let experts = "model.layers.10.mlp.experts.gate_up_proj";
    let blocks = checkpoint.bytes(&format!("{experts}_blocks")).unwrap();
    let scales = checkpoint.bytes(&format!("{experts}_scales")).unwrap();
    assert!(scales.iter().all(|scale| (118..=121).contains(scale)));
    let mut numbers = vec![0.0; scales.len() * mxfp4::BLOCK];
    mxfp4::decode(&blocks, &scales, &mut numbers).unwrap();
    let (mean, deviation) = spread(&numbers);
    assert!(mean.abs() < 0.002, "{mean}");
    assert!((0.02..0.03).contains(&deviation), "{deviation}");
}

#[test]
fn a_seed_gives_the_same_bytes() {
    let around = tempfile::tempdir().unwrap();
    let folders = [1, 1, 2].map(|seed| {
        let folder = around.path().join(format!(
            "{seed}-{}",
            fs::read_dir(around.path()).unwrap().count()
        ));
        make_tiny(seed, &folder);
        folder
    });
    let mut different = 0;
    for entry in fs::read_dir(&folders[0]).unwrap() {
        let name = entry.unwrap().file_name();
        let [one, again, other] = folders.each_ref().map(|f| fs::read(f.join(&name)).unwrap());
        assert!(one == again, "{name:?}");
        different += usize::from(one != other);
    }
    assert_eq!(different, TINY.shards().unwrap().len());
}

#[test]
fn wrong_options_are_refused() {
    let parse = |line: &str| {
        let args: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        parse(&args)
    };
    for (line, part) in [
        ("", "needs --size 20b|120b and --output"),
        ("--size 7b --output x", "--size takes 20b or 120b, got `7b`"),
        (
            "--size 20b --output x --layers 25",
            "--layers takes 1 to 24",
        ),
        ("--size 20b --output", "--output without a value"),
        (
            "--size 20b --output x --seed y",
            "--seed takes a whole number",
        ),
        ("--width 3", "no option `--width`"),
    ] {
        let message = parse(line).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
    let request = parse("--size 120b --output a/b --layers 2 --seed 9").unwrap();
    assert_eq!(
        (request.sizes.layers, request.all_layers, request.seed),
        (2, 36, 9)
    );
}
