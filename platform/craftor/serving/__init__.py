"""Images over HTTP from any mixture of tuned encoders: one UNet, requests batched denoising step by denoising step."""
