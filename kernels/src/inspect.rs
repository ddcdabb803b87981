//! What a cubin is made of, read without a GPU: registers, stack, spills, instructions.

use std::path::Path;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::config::{AttentionConfig, Expected};
use crate::desc::AttentionDesc;
use crate::error::{KernelError, Result};
use crate::source::Source;
use crate::toolchain::Toolchain;

/// Resources of one function, as `cuobjdump --dump-resource-usage` tells them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Function {
    /// Entry point.
    pub name: String,
    /// Registers of a thread at its start (a warpgroup may take more afterwards).
    pub registers: u32,
    /// Bytes of stack.
    pub stack: u32,
    /// Bytes of static shared memory.
    pub shared: u32,
    /// Bytes of local memory.
    pub local: u32,
}

/// Instructions of a cubin, counted in `nvdisasm`'s output.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instructions {
    /// Warpgroup multiplications.
    pub hgmma: u32,
    /// TMA loads of boxes.
    pub utmaldg: u32,
    /// TMA copies of stretches.
    pub ublkcp: u32,
    /// Warp multiplications.
    pub hmma: u32,
    /// Loads from local memory: spills.
    pub local_loads: u32,
    /// Stores to local memory: spills.
    pub local_stores: u32,
}

/// Everything that was seen in a cubin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Its functions, by name.
    pub functions: Vec<Function>,
    /// Its instructions.
    pub instructions: Instructions,
}

fn run(tool: &Path, arguments: &[&str], cubin: &Path) -> Result<String> {
    let failed = |message: String| KernelError::Tool {
        tool: tool.display().to_string(),
        message,
    };
    let output = Command::new(tool)
        .args(arguments)
        .arg(cubin)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        return Err(failed(format!(
            "{} on {}: {}",
            output.status,
            cubin.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        )));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Reads `Function NAME:` lines and the line of `KEY:NUMBER` pairs that follows each.
fn functions(text: &str) -> Vec<Function> {
    let mut found = Vec::new();
    let mut name = None;
    for line in text.lines() {
        let line = line.trim();
        if let Some(rest) = line.strip_prefix("Function ") {
            name = Some(rest.trim_end_matches(':').to_owned());
        } else if let (Some(of), true) = (&name, line.starts_with("REG:")) {
            let value = |key: &str| {
                line.split_whitespace()
                    .find_map(|pair| pair.strip_prefix(key)?.strip_prefix(':')?.parse().ok())
                    .unwrap_or(u32::MAX)
            };
            found.push(Function {
                name: of.clone(),
                registers: value("REG"),
                stack: value("STACK"),
                shared: value("SHARED"),
                local: value("LOCAL"),
            });
            name = None;
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

/// Counts instructions by the first word of their mnemonic.
fn instructions(text: &str) -> Instructions {
    let mut count = Instructions::default();
    for line in text.lines() {
        // "/*0050*/  @P1 BRA `(.L_x_1) ;": after the address, an optional predicate, the mnemonic.
        let Some((_, code)) = line.split_once("*/") else {
            continue;
        };
        let word = code
            .split_whitespace()
            .find(|word| !word.starts_with('@') && !word.starts_with('{'))
            .unwrap_or_default();
        match word.split('.').next().unwrap_or_default() {
            "HGMMA" => count.hgmma += 1,
            "UTMALDG" => count.utmaldg += 1,
            "UBLKCP" => count.ublkcp += 1,
            "HMMA" => count.hmma += 1,
            "LDL" => count.local_loads += 1,
            "STL" => count.local_stores += 1,
            _ => {}
        }
    }
    count
}

impl Report {
    /// Reads a cubin with the toolkit's tools.
    ///
    /// # Errors
    /// When a tool cannot be run or does not take the file.
    pub fn of(toolchain: &Toolchain, cubin: &Path) -> Result<Self> {
        let usage = run(&toolchain.cuobjdump(), &["--dump-resource-usage"], cubin)?;
        let code = run(&toolchain.nvdisasm(), &["-c"], cubin)?;
        Ok(Self {
            functions: functions(&usage),
            instructions: instructions(&code),
        })
    }

    /// What is wrong with it, one sentence each; empty when it is as it must be.
    pub fn complaints(
        &self,
        desc: &AttentionDesc,
        config: &AttentionConfig,
        log: &str,
    ) -> Vec<String> {
        self.against(
            &Source::of(desc, config).functions,
            config.threads,
            config.expected_instructions(desc),
            log,
        )
    }

    /// The same for functions of any source; `threads` are those of a CTA of the first.
    pub fn against(
        &self,
        wanted: &[&str],
        threads: u32,
        expected: Expected,
        log: &str,
    ) -> Vec<String> {
        let mut complaints = Vec::new();
        for &name in wanted {
            if !self.functions.iter().any(|f| f.name == name) {
                complaints.push(format!("no function {name} in it"));
            }
        }
        for f in &self.functions {
            if f.stack != 0 || f.local != 0 {
                complaints.push(format!(
                    "{}: {} bytes of stack and {} of local memory, expected none",
                    f.name, f.stack, f.local
                ));
            }
            if u64::from(f.registers) * u64::from(threads) > 65536
                && wanted.first() == Some(&&*f.name)
            {
                complaints.push(format!(
                    "{}: {} registers x {threads} threads do not fit into 65536",
                    f.name, f.registers
                ));
            }
        }
        let i = self.instructions;
        if i.local_loads + i.local_stores != 0 {
            complaints.push(format!(
                "{} LDL and {} STL instructions, expected none",
                i.local_loads, i.local_stores
            ));
        }
        let Expected {
            hgmma,
            utmaldg,
            ublkcp,
            hmma,
        } = expected;
        for (name, found, expected) in [
            ("HGMMA", i.hgmma, hgmma),
            ("UTMALDG", i.utmaldg, utmaldg),
            ("UBLKCP", i.ublkcp, ublkcp),
        ] {
            if found != expected {
                complaints.push(format!("{found} {name} instructions, expected {expected}"));
            }
        }
        if i.hmma < hmma {
            complaints.push(format!(
                "{} HMMA instructions, expected at least {hmma}",
                i.hmma
            ));
        }
        for line in log.lines() {
            let spills = line
                .split(", ")
                .any(|part| part.contains("bytes spill") && !part.trim().starts_with("0 bytes"));
            // C7508 to C7514: multiplications that the assembler made wait for each other.
            if spills || line.contains("serialized") || line.contains("warning") {
                complaints.push(format!("the compiler said: {}", line.trim()));
            }
        }
        complaints
    }

    /// The report for people.
    pub fn table(&self) -> String {
        use std::fmt::Write as _;
        let mut text = String::new();
        for f in &self.functions {
            let _ = writeln!(
                text,
                "{:<14} {:>3} registers, stack {}, local {}, static shared {} B",
                f.name, f.registers, f.stack, f.local, f.shared
            );
        }
        let i = self.instructions;
        let _ = writeln!(
            text,
            "instructions   {} HGMMA, {} UTMALDG, {} UBLKCP, {} HMMA, {} LDL, {} STL",
            i.hgmma, i.utmaldg, i.ublkcp, i.hmma, i.local_loads, i.local_stores
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Arch;

    const USAGE: &str = "Resource usage:\n Common:\n  GLOBAL:0\n Function mlac_plan:\n  REG:23 STACK:0 SHARED:4096 LOCAL:0 CONSTANT[0]:568 TEXTURE:0\n Function mlac_decode:\n  REG:168 STACK:8 SHARED:0 LOCAL:0 TEXTURE:0\n";

    #[test]
    fn tools_are_read() {
        let found = functions(USAGE);
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].name.as_str(), found[0].stack), ("mlac_decode", 8));
        assert_eq!((found[1].registers, found[1].shared), (23, 4096));
        let code = "        /*0050*/               @P1 BRA `(.L_x_1) ;\n        /*0060*/  HGMMA.64x64x16.F32.BF16 R152, gdesc[UR4], RZ, !UPT ;\n        /*0070*/ @!UP0 UTMALDG.3D [UR8], [UR6] ;\n  /*0080*/ STL [R1], RZ ;\n  .byte 0x1 // LDL";
        let count = instructions(code);
        assert_eq!(
            count,
            Instructions {
                hgmma: 1,
                utmaldg: 1,
                local_stores: 1,
                ..Instructions::default()
            }
        );
    }

    #[test]
    fn everything_that_must_not_be_is_complained_about() {
        let desc = AttentionDesc::latent(64, 128, 64, Arch::Sm90a);
        let config = AttentionConfig::choose(&desc).unwrap();
        let report = Report {
            functions: functions(USAGE),
            instructions: Instructions {
                hgmma: 3,
                utmaldg: 6,
                local_loads: 1,
                ..Instructions::default()
            },
        };
        let log = "ptxas info : (C7510) wgmma.mma_async instructions are serialized\nptxas . 0 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads";
        let text = report.complaints(&desc, &config, log).join("\n");
        for part in [
            "no function mlac_combine",
            "mlac_decode: 8 bytes of stack",
            "1 LDL",
            "3 HGMMA instructions, expected 32",
            "C7510",
            "4 bytes spill",
        ] {
            assert!(text.contains(part), "{part} in:\n{text}");
        }
        assert!(!text.contains("UTMALDG"), "{text}");
    }
}
