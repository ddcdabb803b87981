//! Launching the dense product.

use std::ptr;

use cudarc::driver::sys;

use super::check::Region;
use super::driver::{Device, Stream};
use super::module::{Module, launch, resident, tensor_map};
use crate::Arch;
use crate::desc::Dtype;
use crate::error::Result;
use crate::matmul::Matmul;

/// The dense product on one GPU.
pub struct Multiplier {
    choice: Matmul,
    function: sys::CUfunction,
    /// CTAs that run at a time.
    resident: u32,
    _module: Module,
    _device: Device,
}

impl Multiplier {
    /// Loads a cubin.
    ///
    /// # Errors
    /// When the GPU is another architecture, or the driver does not take the cubin.
    pub fn load(device: &Device, arch: Arch, cubin: &[u8]) -> Result<Self> {
        device.expect(arch, Matmul::FUNCTION)?;
        let choice = Matmul::of(arch);
        let module = Module::load(cubin)?;
        let function = module.function(Matmul::FUNCTION)?;
        let resident = resident(function, choice.threads, choice.shared_bytes)?;
        Ok(Self {
            choice,
            function,
            resident: device.multiprocessors() * resident,
            _module: module,
            _device: device.clone(),
        })
    }

    /// The choice.
    pub fn choice(&self) -> &Matmul {
        &self.choice
    }

    /// `out [rows, columns] = a [rows, depth] * transposed b [columns, depth]`, bf16, in the order of the stream;
    /// `regions` are a, b and out, `size` rows, columns and depth.
    ///
    /// # Errors
    /// When the matrices are not whole tiles or longer than their regions; what the driver says.
    pub fn launch(&self, regions: [Region; 3], size: [u32; 3], stream: &Stream) -> Result<()> {
        let (mut params, tiles) = self.choice.params(regions, size)?;
        let ([a, b, _], [rows, columns, depth]) = (regions, size.map(u64::from));
        let mut maps = if self.choice.arch.has_wgmma() {
            vec![
                tensor_map(Dtype::Bf16, a, [depth, rows, 1])?,
                tensor_map(Dtype::Bf16, b, [depth, columns, 1])?,
            ]
        } else {
            Vec::new()
        };
        let mut arguments = vec![ptr::from_mut(&mut params).cast()];
        arguments.extend(maps.iter_mut().map(|map| ptr::from_mut(map).cast()));
        launch(
            self.function,
            tiles.min(self.resident),
            self.choice.threads,
            self.choice.shared_bytes,
            stream,
            false,
            &mut arguments,
        )
    }
}
