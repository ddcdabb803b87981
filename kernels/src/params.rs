//! The parameter structures of the kernels, field by field as in `cuda/common.cuh`, `cuda/append.cuh`, `cuda/store.cuh` and
//! `cuda/matmul.cuh`.

/// A device address.
pub type Address = u64;

/// `DecodeParams`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[expect(
    missing_docs,
    reason = "documented where the kernels read them: cuda/common.cuh"
)]
pub struct DecodeParams {
    pub q: Address,
    pub cache: Address,
    pub values: Address,
    pub out: Address,
    pub lse: Address,
    pub out_part: Address,
    pub lse_part: Address,
    pub sinks: Address,
    pub lengths: Address,
    pub pages: Address,
    pub tree: Address,
    pub bounds: Address,
    pub owners: Address,
    pub batch: i32,
    pub page_stride: i32,
    pub parts: i32,
    pub scale: f32,
}

/// `PlanParams`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(
    missing_docs,
    reason = "documented where the kernels read them: cuda/common.cuh"
)]
pub struct PlanParams {
    pub lengths: Address,
    pub bounds: Address,
    pub owners: Address,
    pub costs: Address,
    pub batch: i32,
    pub parts: i32,
}

/// `AppendParams`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(
    missing_docs,
    reason = "documented where the kernels read them: cuda/append.cuh"
)]
pub struct AppendParams {
    pub latent: Address,
    pub key: Address,
    pub cosines: Address,
    pub sines: Address,
    pub positions: Address,
    pub slots: Address,
    pub cache: Address,
    pub tokens: i32,
    pub table_rows: i32,
    pub cache_rows: i32,
}

/// `StoreParams`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(
    missing_docs,
    reason = "documented where the kernels read them: cuda/store.cuh"
)]
pub struct StoreParams {
    pub rows: Address,
    pub cache: Address,
    pub past: Address,
    pub table: Address,
    pub lengths: Address,
    pub pages: Address,
    pub batch: i32,
    pub page_stride: i32,
    pub cache_pages: i32,
}

/// `MatmulParams`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(
    missing_docs,
    reason = "documented where the kernels read them: cuda/matmul.cuh"
)]
pub struct MatmulParams {
    pub a: Address,
    pub b: Address,
    pub out: Address,
    pub rows: i32,
    pub columns: i32,
    pub depth: i32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::HEADERS;

    /// The fields of a C structure: name and whether it is a pointer.
    fn fields(file: &str, name: &str) -> Vec<(String, bool)> {
        let text = HEADERS.iter().find(|(n, _)| *n == file).unwrap().1;
        let body = text.split(&format!("struct {name} {{")).nth(1).unwrap();
        let body = body.split("};").next().unwrap();
        body.lines()
            .filter_map(|line| line.split("//").next().unwrap().trim().strip_suffix(';'))
            .map(|declaration| {
                let field = declaration.rsplit([' ', '*']).next().unwrap().to_owned();
                (field, declaration.contains('*'))
            })
            .collect()
    }

    /// The fields of the Rust structure, from its `Debug` form.
    fn ours(debug: &str) -> Vec<String> {
        debug
            .split(['{', ','])
            .filter_map(|part| part.split_once(':').map(|(name, _)| name.trim().to_owned()))
            .collect()
    }

    #[test]
    fn structures_have_the_fields_of_the_kernels_in_their_order() {
        for (file, name, debug, size) in [
            (
                "common.cuh",
                "DecodeParams",
                format!("{:?}", DecodeParams::default()),
                size_of::<DecodeParams>(),
            ),
            (
                "common.cuh",
                "PlanParams",
                format!("{:?}", PlanParams::default()),
                size_of::<PlanParams>(),
            ),
            (
                "append.cuh",
                "AppendParams",
                format!("{:?}", AppendParams::default()),
                size_of::<AppendParams>(),
            ),
            (
                "store.cuh",
                "StoreParams",
                format!("{:?}", StoreParams::default()),
                size_of::<StoreParams>(),
            ),
            (
                "matmul.cuh",
                "MatmulParams",
                format!("{:?}", MatmulParams::default()),
                size_of::<MatmulParams>(),
            ),
        ] {
            let theirs = fields(file, name);
            let names: Vec<String> = theirs.iter().map(|(field, _)| field.clone()).collect();
            assert_eq!(ours(&debug), names, "{name}");
            // Pointers first, then 4-byte numbers: the size follows, without padding but at the end.
            let bytes: usize = theirs.iter().map(|(_, p)| if *p { 8 } else { 4 }).sum();
            assert_eq!(size, bytes.next_multiple_of(8), "{name}");
            assert!(theirs.is_sorted_by_key(|(_, pointer)| !pointer), "{name}");
        }
    }
}
