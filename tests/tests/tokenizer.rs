//! `SmolLM2`'s tokenizer, read from the GGUF's own vocabulary, gives the ids and texts that the
//! tokenizers library gives for awkward strings.

use mlac_model::Checkpoint;
use mlac_tests::cases::Cases;
use mlac_tests::{fixtures, runtime, text};

#[test]
fn smollm2_encodes_and_decodes_as_the_reference() {
    let path = runtime::smollm2().unwrap();
    let tokenizer = Checkpoint::open(&path).unwrap().tokenizer().unwrap();
    let encodings = fixtures::json("smollm2/encodings.json").unwrap();
    let mut cases = Cases::new();
    for case in encodings.as_array().unwrap() {
        let string = case["text"].as_str().unwrap();
        cases.run(format!("{string:?}"), || {
            let ids = tokenizer.encode(string).map_err(text)?;
            let expected: Vec<u32> = case["ids"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|id| u32::try_from(id.as_u64()?).ok())
                .collect();
            if ids != expected {
                return Err(format!("ids {ids:?}, expected {expected:?}"));
            }
            let decoded = tokenizer.decode(&ids).map_err(text)?;
            if case["decoded"] != decoded.as_str() {
                return Err(format!(
                    "decodes to {decoded:?}, expected {}",
                    case["decoded"]
                ));
            }
            Ok(())
        });
    }
    cases.finish(55);
}
