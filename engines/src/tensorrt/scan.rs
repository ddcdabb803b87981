//! The nodes of an ONNX file, without building its graph.
//!
//! A node that resolves to a registered plugin makes TensorRT for RTX end the process, so every
//! node's domain and operator are looked at first. This walks the protobuf wire format by the
//! field numbers of ONNX's own schema (onnx.proto) and skips everything else, tensors included.

use std::fs;
use std::path::Path;

use mlac_model::Refusal;

use crate::error::{EngineError, Result};

/// An operator of a graph, or of a graph nested in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Empty for ONNX's own operators.
    pub domain: String,
    /// The operator.
    pub op_type: String,
    /// The node's name; may be empty.
    pub name: String,
    /// Whether it has an attribute by which TensorRT's parser looks for a plugin.
    pub plugin: bool,
}

/// The attributes by which TensorRT's parser tells plugins of one name apart.
const PLUGIN_ATTRIBUTES: [&str; 2] = ["plugin_version", "plugin_namespace"];

/// Graphs nested in attributes of nodes nested in graphs: real files have two or three levels.
const MAX_DEPTH: usize = 32;

/// Operators of ONNX Runtime's own domain that TensorRT's parser understands.
const MICROSOFT: [&str; 3] = [
    "RotaryEmbedding",
    "SimplifiedLayerNormalization",
    "SkipSimplifiedLayerNormalization",
];

/// Every node of an ONNX file, in file order, nested graphs and functions included.
pub fn nodes(path: &Path) -> Result<Vec<Node>> {
    let bytes = fs::read(path).map_err(EngineError::io(path, "read the ONNX file"))?;
    let mut found = Vec::new();
    model(&bytes, &mut found).map_err(|what| {
        Refusal::new(
            path.display().to_string(),
            "an ONNX file",
            what,
            "export the model again; the file may have been cut short",
        )
    })?;
    Ok(found)
}

/// Refuses a file that has nodes which TensorRT must not see. `plugins` are the names that
/// TensorRT has registered by itself.
pub(super) fn check(path: &Path, plugins: &[String]) -> Result<()> {
    let foreign = |node: &&Node| match node.domain.as_str() {
        _ if node.plugin => true,
        "" | "ai.onnx" => plugins.contains(&node.op_type),
        "com.microsoft" => !MICROSOFT.contains(&node.op_type.as_str()),
        _ => true,
    };
    let nodes = nodes(path)?;
    let mut bad: Vec<String> = nodes
        .iter()
        .filter(foreign)
        .map(|node| format!("{}::{}", node.domain, node.op_type))
        .collect();
    let count = bad.len();
    bad.sort();
    bad.dedup();
    if bad.is_empty() {
        return Ok(());
    }
    Err(Refusal::new(
        path.display().to_string(),
        "ONNX's own operators: TensorRT for RTX takes no plugins",
        format!("{count} nodes of {}", bad.join(", ")),
        "export with --tensorrt: standard operators. The form with plugins is for enterprise TensorRT",
    )
    .into())
}

type Walk = std::result::Result<(), String>;

/// One field of a message.
enum Field<'a> {
    Bytes(u64, &'a [u8]),
    Other,
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn varint(&mut self) -> std::result::Result<u64, String> {
        let mut value = 0_u64;
        for index in 0..10 {
            let (&byte, rest) = self
                .rest
                .split_first()
                .ok_or("a number that is cut short")?;
            self.rest = rest;
            value |= u64::from(byte & 0x7f).checked_shl(7 * index).unwrap_or(0);
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err("a number longer than ten bytes".into())
    }

    fn take(&mut self, length: u64) -> std::result::Result<&'a [u8], String> {
        let available = self.rest.len();
        let length = usize::try_from(length)
            .ok()
            .filter(|length| *length <= available)
            .ok_or_else(|| format!("a field of {length} bytes where {available} are left"))?;
        let (taken, rest) = self.rest.split_at(length);
        self.rest = rest;
        Ok(taken)
    }

    /// The next field, or `None` at the end.
    fn field(&mut self) -> std::result::Result<Option<Field<'a>>, String> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let key = self.varint()?;
        let number = key >> 3;
        if number == 0 {
            return Err("field number 0".into());
        }
        Ok(Some(match key & 7 {
            0 => {
                self.varint()?;
                Field::Other
            }
            1 => {
                self.take(8)?;
                Field::Other
            }
            2 => {
                let length = self.varint()?;
                Field::Bytes(number, self.take(length)?)
            }
            5 => {
                self.take(4)?;
                Field::Other
            }
            kind => return Err(format!("a field of unknown kind {kind}")),
        }))
    }
}

/// Calls `visit` for each length-delimited field.
fn fields<'a>(bytes: &'a [u8], mut visit: impl FnMut(u64, &'a [u8]) -> Walk) -> Walk {
    let mut reader = Reader { rest: bytes };
    while let Some(field) = reader.field()? {
        if let Field::Bytes(number, bytes) = field {
            visit(number, bytes)?;
        }
    }
    Ok(())
}

/// ModelProto: graph = 7, functions = 25 (FunctionProto: node = 7).
fn model(bytes: &[u8], found: &mut Vec<Node>) -> Walk {
    let mut graphs = 0;
    fields(bytes, |number, bytes| match number {
        7 => {
            graphs += 1;
            graph(bytes, found, 0)
        }
        25 => fields(bytes, |number, bytes| {
            if number == 7 {
                node(bytes, found, 0)
            } else {
                Ok(())
            }
        }),
        _ => Ok(()),
    })?;
    if graphs == 1 {
        Ok(())
    } else {
        Err(format!("{graphs} graphs"))
    }
}

/// GraphProto: node = 1.
fn graph(bytes: &[u8], found: &mut Vec<Node>, depth: usize) -> Walk {
    if depth > MAX_DEPTH {
        return Err(format!("graphs nested more than {MAX_DEPTH} deep"));
    }
    fields(bytes, |number, bytes| {
        if number == 1 {
            node(bytes, found, depth)
        } else {
            Ok(())
        }
    })
}

/// NodeProto: name = 3, op_type = 4, attribute = 5, domain = 7. AttributeProto: name = 1, g = 6, graphs = 11.
fn node(bytes: &[u8], found: &mut Vec<Node>, depth: usize) -> Walk {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let mut this = Node {
        domain: String::new(),
        op_type: String::new(),
        name: String::new(),
        plugin: false,
    };
    let at = found.len();
    fields(bytes, |number, bytes| {
        match number {
            3 => this.name = text(bytes),
            4 => this.op_type = text(bytes),
            7 => this.domain = text(bytes),
            5 => {
                return fields(bytes, |number, bytes| match number {
                    1 => {
                        this.plugin |= PLUGIN_ATTRIBUTES.iter().any(|a| a.as_bytes() == bytes);
                        Ok(())
                    }
                    6 | 11 => graph(bytes, found, depth + 1),
                    _ => Ok(()),
                });
            }
            _ => {}
        }
        Ok(())
    })?;
    found.insert(at, this);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;

    use super::*;

    fn data(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/data")
            .join(name)
    }

    #[test]
    fn nodes_come_in_file_order_with_nested_ones() {
        let names = |file: &str| -> Vec<String> {
            nodes(&data(file))
                .unwrap()
                .iter()
                .map(|node| format!("{}:{}", node.domain, node.op_type))
                .collect()
        };
        assert_eq!(names("half.onnx"), [":Exp"]);
        assert_eq!(names("foreign.onnx"), ["mlac:LatentAttention"]);
        assert_eq!(
            names("foreign_nested.onnx"),
            [":If", ":Identity", "mlac:LatentAttention"]
        );
        assert_eq!(names("toy/decoder.onnx").len(), 19);
    }

    #[test]
    fn foreign_nodes_are_refused_by_name_wherever_they_are() {
        check(&data("half.onnx"), &[]).unwrap();
        for file in ["foreign.onnx", "foreign_nested.onnx"] {
            let error = check(&data(file), &[]).unwrap_err().to_string();
            assert!(
                error.contains("found 1 nodes of mlac::LatentAttention"),
                "{error}"
            );
        }
        let error = check(&data("half.onnx"), &["Exp".into()])
            .unwrap_err()
            .to_string();
        assert!(error.contains("1 nodes of ::Exp"), "{error}");
    }

    #[test]
    fn every_cut_of_a_real_file_is_an_error_or_fewer_nodes_and_never_a_panic() {
        let whole = fs::read(data("toy/decoder.onnx")).unwrap();
        let mut all = Vec::new();
        model(&whole, &mut all).unwrap();
        for end in 0..whole.len() {
            let mut some = Vec::new();
            let cut = model(&whole[..end], &mut some);
            assert!(
                cut.is_err() || some == all,
                "cut at {end} of {}",
                whole.len()
            );
        }
    }

    #[test]
    fn a_plugin_is_refused_in_any_domain() {
        // A field of up to 127 bytes.
        let field = |number: u8, bytes: &[u8]| {
            let mut out = vec![number << 3 | 2, bytes.len() as u8];
            out.extend(bytes);
            out
        };
        let file = |attribute: &str| {
            let attribute = field(5, &field(1, attribute.as_bytes()));
            let node = [field(4, b"LatentAttention"), attribute].concat();
            field(7, &field(1, &node))
        };
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("plugin.onnx");
        for (attribute, refused) in [
            ("plugin_version", true),
            ("plugin_namespace", true),
            ("plugin_versions", false),
        ] {
            fs::write(&path, file(attribute)).unwrap();
            let result = check(&path, &[]);
            assert_eq!(result.is_err(), refused, "{attribute}");
            if let Err(error) = result {
                let error = error.to_string();
                assert!(error.contains("1 nodes of ::LatentAttention"), "{error}");
            }
        }
    }

    #[test]
    fn nesting_is_bounded() {
        // graph { node { attribute { g { node { ... } } } } } far deeper than any real file.
        let mut graph: Vec<u8> = Vec::new();
        for _ in 0..200 {
            let mut nested = graph.clone();
            for number in [6_u8, 5, 1] {
                let mut outer = vec![number << 3 | 2];
                let mut length = nested.len();
                while length >= 0x80 {
                    outer.push((length & 0x7f) as u8 | 0x80);
                    length >>= 7;
                }
                outer.push(length as u8);
                outer.extend(nested);
                nested = outer;
            }
            graph = nested;
        }
        let mut file = vec![7 << 3 | 2, 0, 0];
        let length = graph.len();
        file[1] = (length & 0x7f) as u8 | 0x80;
        file[2] = (length >> 7) as u8;
        file.extend(graph);
        let error = model(&file, &mut Vec::new()).unwrap_err();
        assert!(error.contains("nested more than 32 deep"), "{error}");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = model(&bytes, &mut Vec::new());
        }

        #[test]
        fn no_change_of_a_byte_makes_it_panic(at in 0_usize..1683, byte in any::<u8>()) {
            let mut whole = fs::read(data("toy/decoder.onnx")).unwrap();
            let at = at % whole.len();
            whole[at] = byte;
            let _ = model(&whole, &mut Vec::new());
        }
    }
}
