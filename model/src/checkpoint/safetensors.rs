//! Reading safetensors: one file, and an index over several.
//!
//! The format (safetensors 0.8): 8 bytes of header length, a JSON header, the data. The header
//! maps names to dtype, shape and byte range; ranges cover the data without gap or overlap.
//! Everything here is untrusted: nothing is allocated by a length that was not checked against the
//! file first.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    ops::Range,
    path::{Path, PathBuf},
};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};

use super::{map::Map, reader::Source};
use crate::{Dtype, Error, TensorInfo, tensor::shape_text};

/// Longest header the format's own library accepts.
const LONGEST_HEADER: u64 = 100_000_000;

/// What to do about a file whose parts contradict each other.
const DAMAGED: &str = "the file is damaged: get it again";

/// Tensors of one file in the order of their data, with their byte ranges in the file.
pub type Layout = Vec<(TensorInfo, Range<usize>)>;

/// Checks a whole file's header against its length and returns where its tensors are.
///
/// `bytes` is the file, `file` names it in messages.
pub fn read_layout(bytes: &[u8], file: &Path) -> Result<Layout, Error> {
    let name = file.display().to_string();
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(Error::refusal(
            name,
            "8 bytes of header length",
            format!("a file of {} bytes", bytes.len()),
            DAMAGED,
        ));
    };
    let header_len = u64::from_le_bytes(*length);
    if header_len > LONGEST_HEADER || header_len > rest.len() as u64 {
        return Err(Error::refusal(
            format!("{name}: header"),
            format!("at most {} bytes", LONGEST_HEADER.min(rest.len() as u64)),
            format!(
                "a header length of {header_len} in a file of {} bytes",
                bytes.len()
            ),
            "the file is cut short or no safetensors file: get it again",
        ));
    }
    let (header, data) = rest.split_at(header_len as usize);
    let header: Header = serde_json::from_slice(header).map_err(|source| Error::Json {
        path: file.to_owned(),
        source,
    })?;
    let mut layout = Layout::with_capacity(header.0.len());
    for (tensor, entry) in header.0 {
        layout.push(check_entry(&name, &tensor, entry)?);
    }
    layout.sort_by_key(|(_, range)| (range.start, range.end));
    let mut end = 0;
    for (info, range) in &layout {
        if range.start != end {
            let what = if range.start < end {
                "overlaps"
            } else {
                "leaves a gap after"
            };
            return Err(Error::refusal(
                format!("{name}: tensor {}", info.name),
                format!("data that begins at byte {end}, where the tensor before it ends"),
                format!("byte {}: it {what} the tensor before it", range.start),
                DAMAGED,
            ));
        }
        end = range.end;
    }
    if end != data.len() {
        let what = if end > data.len() {
            "the file is cut short"
        } else {
            "bytes follow the data"
        };
        return Err(Error::refusal(
            match layout.last() {
                Some((info, _)) => format!("{name}: data, last tensor {}", info.name),
                None => format!("{name}: data"),
            },
            format!("{end} bytes of data, as the header says"),
            format!("{} bytes: {what}", data.len()),
            DAMAGED,
        ));
    }
    let base = 8 + header_len as usize;
    for (_, range) in &mut layout {
        *range = base + range.start..base + range.end;
    }
    Ok(layout)
}

fn check_entry(file: &str, name: &str, entry: Entry) -> Result<(TensorInfo, Range<usize>), Error> {
    let subject = || format!("{file}: tensor {name}");
    let Some(dtype) = Dtype::from_safetensors_name(&entry.dtype) else {
        return Err(Error::refusal(
            subject(),
            "a dtype of whole bytes",
            format!("dtype {:?}", entry.dtype),
            "use a checkpoint with f32, f16 or bf16 weights",
        ));
    };
    let [start, end] = entry.data_offsets;
    if start > end {
        return Err(Error::refusal(
            subject(),
            "a byte range that ends after it begins",
            format!("{start} to {end}"),
            DAMAGED,
        ));
    }
    let info = TensorInfo {
        name: name.to_owned(),
        dtype,
        shape: entry.shape,
    };
    let needed = info.byte_len().map_err(|_| {
        Error::refusal(
            subject(),
            "a shape whose bytes can be counted",
            format!("{dtype} {}", shape_text(&info.shape)),
            DAMAGED,
        )
    })?;
    if needed != end - start {
        return Err(Error::refusal(
            subject(),
            format!("{needed} bytes for {dtype} {}", shape_text(&info.shape)),
            format!("a byte range of {}", end - start),
            DAMAGED,
        ));
    }
    Ok((info, start..end))
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [usize; 2],
}

/// Header entries in file order; unlike a JSON map it refuses a name that comes twice.
struct Header(Vec<(String, Entry)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<HashMap<String, String>>()?;
                    } else {
                        let entry = map.next_value().map_err(|error| {
                            serde::de::Error::custom(format!("tensor {name}: {error}"))
                        })?;
                        if entries.contains_key(&name) {
                            return Err(serde::de::Error::custom(format!(
                                "tensor {name} comes twice in the header"
                            )));
                        }
                        entries.insert(name, entry);
                    }
                }
                Ok(Header(entries.into_iter().collect()))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// The `weight_map` of an index file: tensor name to shard file name.
///
/// Shard names are plain file names; anything with a path in it is refused.
pub fn read_index(text: &[u8], file: &Path) -> Result<BTreeMap<String, String>, Error> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: UniqueMap,
    }
    let index: Index = serde_json::from_slice(text).map_err(|source| Error::Json {
        path: file.to_owned(),
        source,
    })?;
    for (tensor, shard) in &index.weight_map.0 {
        let plain = !shard.contains(['/', '\\', '\0'])
            && Path::new(shard)
                .extension()
                .is_some_and(|extension| extension == "safetensors");
        if !plain {
            return Err(Error::refusal(
                format!("{}: tensor {tensor}", file.display()),
                "the name of a .safetensors file in the same folder",
                format!("{shard:?}"),
                "correct the index or get it again",
            ));
        }
    }
    Ok(index.weight_map.0)
}

/// A map from strings to strings that refuses a key that comes twice.
struct UniqueMap(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for UniqueMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = UniqueMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of shard names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<UniqueMap, A::Error> {
                let mut pairs = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<String, String>()? {
                    if pairs.contains_key(&key) {
                        return Err(serde::de::Error::custom(format!(
                            "tensor {key} comes twice in weight_map"
                        )));
                    }
                    pairs.insert(key, value);
                }
                Ok(UniqueMap(pairs))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}

/// The mapped shards of one checkpoint.
#[derive(Debug)]
pub(super) struct Shards {
    files: Vec<(PathBuf, Map)>,
    /// For each tensor the shard that holds it and its bytes there.
    places: Vec<(usize, Range<usize>)>,
}

impl Shards {
    /// Opens `model.safetensors` or the shards of `model.safetensors.index.json` in a folder.
    pub(super) fn open(folder: &Path) -> Result<(Self, Vec<TensorInfo>), Error> {
        let single = folder.join("model.safetensors");
        let index = folder.join("model.safetensors.index.json");
        match (single.is_file(), index.is_file()) {
            (true, false) => Self::read(&[single], None),
            (false, true) => {
                let text = super::read_small(&index)?;
                let weight_map = read_index(&text, &index)?;
                let mut names: Vec<&String> = weight_map.values().collect();
                names.sort_unstable();
                names.dedup();
                let files: Vec<PathBuf> = names.iter().map(|name| folder.join(name)).collect();
                if let Some(missing) = files.iter().find(|file| !file.exists()) {
                    return Err(Error::refusal(
                        missing.display().to_string(),
                        format!("the shard that {} names", index.display()),
                        "no such file",
                        "get the missing shard",
                    ));
                }
                Self::read(&files, Some((&index, &weight_map)))
            }
            (true, true) => Err(Error::refusal(
                folder.display().to_string(),
                "either model.safetensors or model.safetensors.index.json with its shards",
                "both",
                "remove the one that is out of date",
            )),
            (false, false) => Err(Error::refusal(
                folder.display().to_string(),
                "model.safetensors, or model.safetensors.index.json with its shards, or one .gguf file",
                if folder.join("pytorch_model.bin").exists() {
                    "pytorch_model.bin only"
                } else {
                    "none of them"
                },
                "save the model with transformers' save_pretrained",
            )),
        }
    }

    fn read(
        files: &[PathBuf],
        index: Option<(&Path, &BTreeMap<String, String>)>,
    ) -> Result<(Self, Vec<TensorInfo>), Error> {
        let mut shards = Self {
            files: Vec::with_capacity(files.len()),
            places: Vec::new(),
        };
        let mut tensors: Vec<TensorInfo> = Vec::new();
        let mut holders: HashMap<String, usize> = HashMap::new();
        for (at, path) in files.iter().enumerate() {
            let map = Map::open(path)?;
            for (info, range) in read_layout(&map, path)? {
                if let Some(first) = holders.insert(info.name.clone(), at) {
                    return Err(Error::refusal(
                        format!("{}: tensor {}", path.display(), info.name),
                        "each tensor in one shard",
                        format!("the same name in {}", files[first].display()),
                        "remove the shard that is out of date, or get the checkpoint again",
                    ));
                }
                tensors.push(info);
                shards.places.push((at, range));
            }
            shards.files.push((path.clone(), map));
        }
        if let Some((file, weight_map)) = index {
            check_index(file, weight_map, files, &holders)?;
        }
        Ok((shards, tensors))
    }

    /// The stored bytes of a tensor, by its place in the list [`Shards::open`] returned.
    pub(super) fn bytes(&self, tensor: usize) -> &[u8] {
        let (file, range) = &self.places[tensor];
        &self.files[*file].1[range.clone()]
    }

    /// The same bytes by position.
    pub(super) fn source(&self, tensor: usize) -> Source<'_> {
        let (file, range) = &self.places[tensor];
        Source::File {
            map: &self.files[*file].1,
            range: range.clone(),
        }
    }

    /// Takes a tensor's pages out of memory.
    pub(super) fn release(&self, tensor: usize) {
        let (file, range) = &self.places[tensor];
        self.files[*file].1.release(range.clone());
    }

    /// The file that holds a tensor.
    pub(super) fn file(&self, tensor: usize) -> &Path {
        &self.files[self.places[tensor].0].0
    }
}

/// The index and the shards have to name the same tensors in the same files.
fn check_index(
    index: &Path,
    weight_map: &BTreeMap<String, String>,
    files: &[PathBuf],
    holders: &HashMap<String, usize>,
) -> Result<(), Error> {
    for (tensor, shard) in weight_map {
        let holder = holders.get(tensor).map(|&at| &files[at]);
        if holder.and_then(|file| file.file_name()) != Some(shard.as_ref()) {
            return Err(Error::refusal(
                format!("{}: tensor {tensor}", index.display()),
                format!("the tensor in {shard}"),
                match holder {
                    Some(file) => format!("it in {}", file.display()),
                    None => "it in none of the shards".to_owned(),
                },
                "get the checkpoint again: index and shards are of different versions",
            ));
        }
    }
    if let Some((tensor, &at)) = holders
        .iter()
        .filter(|(tensor, _)| !weight_map.contains_key(*tensor))
        .min()
    {
        return Err(Error::refusal(
            format!("{}: tensor {tensor}", files[at].display()),
            format!("only tensors that {} names", index.display()),
            "a tensor that it does not name",
            "get the checkpoint again: index and shards are of different versions",
        ));
    }
    Ok(())
}
