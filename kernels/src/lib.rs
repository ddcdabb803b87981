//! CUDA kernels for latent attention.
