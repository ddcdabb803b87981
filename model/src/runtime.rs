//! Where the runtimes lie that mlac opens at run time: the one order in which every search begins.

use std::path::{Path, PathBuf};

/// The folders called `name` among mlac's own runtimes, in order and each once, with the kind of place: in `chosen` (the
/// variable `MLAC_RUNTIME_DIR`), in `runtime/` beside the program, in `target/runtime` above the program and above the current folder.
pub fn places(
    name: &str,
    chosen: Option<&Path>,
    program: Option<&Path>,
    current: Option<&Path>,
) -> Vec<(PathBuf, &'static str)> {
    let mut places: Vec<(PathBuf, &'static str)> = Vec::new();
    if let Some(folder) = chosen {
        places.push((folder.join(name), "MLAC_RUNTIME_DIR"));
    }
    if let Some(beside) = program.and_then(Path::parent) {
        places.push((beside.join("runtime").join(name), "beside the program"));
    }
    for above in [program, current]
        .into_iter()
        .flatten()
        .flat_map(Path::ancestors)
    {
        // Only where a `target/runtime` exists: the list of places stays readable.
        let runtime = above.join("target").join("runtime");
        let place = runtime.join(name);
        if runtime.is_dir() && !places.iter().any(|(seen, _)| *seen == place) {
            places.push((place, "target/runtime"));
        }
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_variable_program_checkout_and_no_place_comes_twice() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        std::fs::create_dir_all(at("checkout/target/runtime")).unwrap();
        let program = at("checkout/target/debug/mlac");
        let found = places(
            "cuda",
            Some(&at("own")),
            Some(&program),
            Some(&at("checkout/mlac")),
        );
        assert_eq!(
            found,
            [
                (at("own/cuda"), "MLAC_RUNTIME_DIR"),
                (
                    at("checkout/target/debug/runtime/cuda"),
                    "beside the program"
                ),
                (at("checkout/target/runtime/cuda"), "target/runtime"),
            ]
        );
        assert!(places("cuda", None, None, Some(&at("elsewhere"))).is_empty());
    }
}
