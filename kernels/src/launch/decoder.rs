//! The kernels of one request: a step planned, decoded, combined; rows appended.

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::sys;

use super::check::{Append, Call, Grids, most_parts};
use super::driver::{Device, Stream, failed};
use super::module::{Module, launch, resident, tensor_map};
use super::recipe::{COMBINE_THREADS, PLAN_THREADS};
use crate::config::{AttentionConfig, Kernel};
use crate::desc::{Attention, AttentionDesc, CacheDtype};
use crate::error::Result;

/// The kernels of one request on one GPU.
pub struct Decoder {
    desc: AttentionDesc,
    config: AttentionConfig,
    parts: u32,
    decode: sys::CUfunction,
    plan: Option<(sys::CUfunction, sys::CUfunction)>,
    append: Option<sys::CUfunction>,
    _module: Module,
    _device: Device,
}

/// Threads of `mlac_append`.
const APPEND_THREADS: u32 = 128;

impl Decoder {
    /// Loads a cubin.
    ///
    /// # Errors
    /// When the GPU is another architecture, or the driver does not take the cubin.
    pub fn load(
        device: &Device,
        desc: &AttentionDesc,
        config: &AttentionConfig,
        cubin: &[u8],
    ) -> Result<Self> {
        device.expect(desc.arch, &desc.slug())?;
        let module = Module::load(cubin)?;
        let decode = module.function("mlac_decode")?;
        let resident = resident(decode, config.threads, config.shared_bytes)?;
        let plan = if config.planned {
            Some((
                module.function("mlac_plan")?,
                module.function("mlac_combine")?,
            ))
        } else {
            None
        };
        let append = match desc.attention {
            Attention::Latent { .. } => Some(module.function("mlac_append")?),
            Attention::Grouped { .. } => None,
        };
        Ok(Self {
            desc: *desc,
            config: config.clone(),
            parts: most_parts(device.multiprocessors() * resident),
            decode,
            plan,
            append,
            _module: module,
            _device: device.clone(),
        })
    }

    /// CTAs that run at a time: what [`Workspace::of`](super::Workspace::of) and [`Call::check`] want.
    pub fn parts(&self) -> u32 {
        self.parts
    }

    /// Checks the arguments, then plans, decodes and combines, in the order of the stream.
    ///
    /// # Errors
    /// What [`Call::check`] refuses; what the driver says.
    pub fn launch(&self, call: &Call, stream: &Stream) -> Result<()> {
        let grids = call.check(&self.desc, &self.config, self.parts)?;
        if let Some((plan, _)) = self.plan {
            let mut params = grids.plan;
            launch(
                plan,
                1,
                PLAN_THREADS,
                0,
                stream,
                false,
                &mut [ptr::from_mut(&mut params).cast()],
            )?;
        }
        let mut params = grids.decode;
        let dependent = self.plan.is_some() && self.desc.arch.has_wgmma();
        let mut maps = self.maps(call, &grids)?;
        let mut arguments = vec![ptr::from_mut(&mut params).cast()];
        arguments.extend(
            maps.iter_mut()
                .map(|map| ptr::from_mut(map).cast::<c_void>()),
        );
        launch(
            self.decode,
            grids.decode_blocks,
            self.config.threads,
            self.config.shared_bytes,
            stream,
            dependent,
            &mut arguments,
        )?;
        if let Some((_, combine)) = self.plan {
            launch(
                combine,
                grids.combine_blocks,
                COMBINE_THREADS,
                0,
                stream,
                self.desc.arch.has_wgmma(),
                &mut [ptr::from_mut(&mut params).cast()],
            )?;
        }
        Ok(())
    }

    /// Checks the arguments, then writes rows into the cache, in the order of the stream.
    ///
    /// # Errors
    /// What [`Append::check`] refuses; what the driver says.
    pub fn append(&self, rows: &Append, stream: &Stream) -> Result<()> {
        let (mut params, blocks) = rows.check(&self.desc)?;
        let Some(function) = self.append else {
            return Err(failed("append")("the request has no latent"));
        };
        launch(
            function,
            blocks,
            APPEND_THREADS,
            0,
            stream,
            false,
            &mut [ptr::from_mut(&mut params).cast()],
        )
    }

    /// The tensor maps that the decode kernel takes, in its order: boxes of 64 columns, 64 rows, one token or page.
    fn maps(&self, call: &Call, grids: &Grids) -> Result<Vec<sys::CUtensorMap>> {
        let desc = &self.desc;
        let (row, page) = (u64::from(desc.row()), u64::from(desc.page));
        let tokens = u64::from(call.batch * desc.query_tokens);
        let queries = (call.q, [row, u64::from(desc.query_heads), tokens]);
        let of_cache = |region| {
            let columns = row * u64::from(desc.kv_heads());
            (region, [columns, page, grids.cache_pages])
        };
        let wanted = match (self.config.kernel, desc.cache) {
            (Kernel::LatentWgmma, CacheDtype::Same) => vec![queries, of_cache(call.cache)],
            (Kernel::LatentWgmma, CacheDtype::E4m3) => vec![queries],
            (Kernel::GroupedWgmma, _) => vec![of_cache(call.cache), of_cache(call.values)],
            (Kernel::LatentMma | Kernel::GroupedMma, _) => Vec::new(),
        };
        wanted
            .into_iter()
            .map(|(region, extent)| tensor_map(desc.dtype, region, extent))
            .collect()
    }
}
