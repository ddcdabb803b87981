//! GPU architectures that kernels are built for.

use std::fmt;
use std::str::FromStr;

use mlac_model::Refusal;

/// An architecture, as the compiler names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Arch {
    /// A100.
    Sm80,
    /// RTX 30, A10, A40.
    Sm86,
    /// RTX 40, L4, L40.
    Sm89,
    /// H100, H200, with the instructions of that architecture only (wgmma, setmaxnreg).
    Sm90a,
    /// RTX 50, RTX PRO Blackwell.
    Sm120,
}

impl Arch {
    /// Every architecture, oldest first.
    pub const ALL: [Self; 5] = [Self::Sm80, Self::Sm86, Self::Sm89, Self::Sm90a, Self::Sm120];

    /// The compiler's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sm80 => "sm_80",
            Self::Sm86 => "sm_86",
            Self::Sm89 => "sm_89",
            Self::Sm90a => "sm_90a",
            Self::Sm120 => "sm_120",
        }
    }

    /// Compute capability: major and minor.
    pub fn capability(self) -> (u32, u32) {
        match self {
            Self::Sm80 => (8, 0),
            Self::Sm86 => (8, 6),
            Self::Sm89 => (8, 9),
            Self::Sm90a => (9, 0),
            Self::Sm120 => (12, 0),
        }
    }

    /// Most shared memory of one CTA, in bytes (CUDA C++ Programming Guide, technical specifications per compute capability).
    pub fn shared_memory(self) -> u32 {
        match self {
            Self::Sm80 => 163 * 1024,
            Self::Sm86 | Self::Sm89 | Self::Sm120 => 99 * 1024,
            Self::Sm90a => 227 * 1024,
        }
    }

    /// Multiprocessors of the largest GPU (A100, RTX A6000, L40, H100 SXM, RTX PRO 6000 Blackwell; NVIDIA's data sheets).
    pub fn multiprocessors(self) -> u32 {
        match self {
            Self::Sm80 => 108,
            Self::Sm86 => 84,
            Self::Sm89 => 142,
            Self::Sm90a => 132,
            Self::Sm120 => 188,
        }
    }

    /// Whether warpgroup multiplication and the tensor memory accelerator are there.
    pub const fn has_wgmma(self) -> bool {
        matches!(self, Self::Sm90a)
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Arch {
    type Err = Refusal;

    /// `sm_90a`, or `sm90a` as engines write it.
    fn from_str(text: &str) -> Result<Self, Refusal> {
        Self::ALL
            .into_iter()
            .find(|arch| text == arch.name() || text == arch.name().replace('_', ""))
            .ok_or_else(|| {
                let names: Vec<&str> = Self::ALL.iter().map(|arch| arch.name()).collect();
                Refusal::new(
                    format!("architecture `{text}`"),
                    format!("one of {}", names.join(", ")),
                    "no such name",
                    "choose the one of your GPU (H100 and H200: sm_90a)",
                )
            })
    }
}

impl serde::Serialize for Arch {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.name())
    }
}

impl<'de> serde::Deserialize<'de> for Arch {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let name = String::deserialize(from)?;
        name.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_unknown_ones_get_the_list() {
        for arch in Arch::ALL {
            assert_eq!(arch.name().parse::<Arch>(), Ok(arch));
            assert_eq!(arch.name().replace('_', "").parse::<Arch>(), Ok(arch));
        }
        for text in ["", "sm_90", "sm_75", "90a", "SM_80"] {
            let error = text.parse::<Arch>().unwrap_err().to_string();
            assert!(
                error.contains("sm_80, sm_86, sm_89, sm_90a, sm_120"),
                "{error}"
            );
        }
    }
}
