//! The image encoder: a ViT pooled at its class token.

use candle_core::{Result as TensorResult, Tensor};
use peft_adapters::layers::{Embedding, LayerNorm, Linear, PatchConv};
use peft_adapters::{Embedded, Patches, Sequence, Site, SiteId, SiteKind, Sites, Tape, Tower, WeightId, ops};

use super::block::{self, Block, BlockShape, Tensors};
use super::config::{ClipConfig, VisionConfig};
use super::trunk::Trunk;
use crate::error::Result;

/// The image encoder.
#[derive(Debug)]
pub struct VisionTower {
    config: VisionConfig,
    entrance: SiteId,
    class: (WeightId, Tensor),
    patch: PatchConv,
    position: Embedding,
    pre_norm: LayerNorm,
    blocks: Vec<Block>,
    post_norm: LayerNorm,
    projection: Linear,
    features: SiteId,
}

impl VisionTower {
    /// Takes the tensors and registers the sites.
    ///
    /// # Errors
    /// When a tensor is missing or misshapen.
    pub fn new(config: &ClipConfig, tensors: &mut Tensors, sites: &mut Sites) -> Result<Self> {
        let vision = &config.vision;
        let tower = Tower::Vision;
        let name = "vision_model.embeddings.class_embedding";
        let class = tensors.take(name)?;
        let class = (sites.add_weight(name, tower, None, class.clone()), class);
        let path = "vision_model.embeddings.patch_embedding";
        let patch = sites.patch_conv(path, tower, tensors.take(&format!("{path}.weight"))?).map_err(super::method_error)?;
        let table = tensors.take("vision_model.embeddings.position_embedding.weight")?;
        let position = sites.embedding("vision_model.embeddings.position_embedding", tower, table).map_err(super::method_error)?;
        let kind = SiteKind::Embed { dim: vision.hidden_size, limit: usize::MAX };
        let entrance = sites.add(Site { path: "vision_model.embeddings".into(), tower, layer: None, kind });
        let norm = |sites: &mut Sites, tensors: &mut Tensors, path: &str| -> Result<LayerNorm> {
            Ok(sites.layer_norm(path, tower, None, tensors.pair(path)?, vision.layer_norm_eps))
        };
        let pre_norm = norm(sites, tensors, "vision_model.pre_layrnorm")?;
        let shape = BlockShape {
            tower,
            dim: vision.hidden_size,
            heads: vision.num_attention_heads,
            eps: vision.layer_norm_eps,
            act: vision.hidden_act,
            causal: false,
        };
        let blocks = (0..vision.num_hidden_layers)
            .map(|i| Block::new(&format!("vision_model.encoder.layers.{i}"), i, shape, tensors, sites))
            .collect::<Result<_>>()?;
        let post_norm = norm(sites, tensors, "vision_model.post_layernorm")?;
        let weight = tensors.take("visual_projection.weight")?;
        let projection = sites.linear("visual_projection", tower, None, weight, None).map_err(super::method_error)?;
        let features =
            sites.add(Site { path: "vision_model".into(), tower, layer: None, kind: SiteKind::Features { dim: config.projection_dim } });
        Ok(Self { config: vision.clone(), entrance, class, patch, position, pre_norm, blocks, post_norm, projection, features })
    }

    /// The number of patches of an image.
    #[must_use]
    pub fn patch_count(&self) -> usize {
        let side = self.config.image_size / self.config.patch_size;
        side * side
    }

    /// Projected image features, not normalised.
    ///
    /// `keep` [B, K] u32 names the patches that stay (patch dropout, Li et al. 2023); all when `None`.
    /// With a tape, blocks keep only their input for the backward pass.
    ///
    /// # Shapes
    /// `pixels` [B, 3, H, W] → [B, P]
    ///
    /// # Errors
    /// When the image size is not the model's.
    pub fn forward<'a>(
        &'a self,
        pixels: Tensor,
        keep: Option<&Tensor>,
        patches: &'a Patches,
        tape: Option<&Tape<'a>>,
    ) -> TensorResult<Tensor> {
        let embedded = self.embed(&pixels, keep, patches)?;
        drop(pixels);
        self.finish(embedded, patches, tape)
    }

    /// How many blocks nothing that is trained reaches; 0 where the images' embedding is trained.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn constant_blocks(&self, patches: &Patches) -> TensorResult<usize> {
        let (side, like) = (self.config.image_size, &self.patch.weight.1);
        let blank = Tensor::zeros((1, 3, side, side), like.dtype(), like.device())?;
        self.embed(&blank, None, patches)?.constant(&self.blocks, patches)
    }

    /// Images up to block `depth`.
    ///
    /// # Shapes
    /// `pixels` [B, 3, H, W] → [B, T, D]
    ///
    /// # Errors
    /// When the image size is not the model's.
    pub fn trunk(&self, pixels: &Tensor, depth: usize, patches: &Patches) -> TensorResult<Trunk> {
        self.embed(pixels, None, patches)?.through(&self.blocks[..depth.min(self.blocks.len())], patches)
    }

    /// Class token and patches with positions, normed: what enters the first block.
    ///
    /// # Errors
    /// When the image size is not the model's.
    pub fn entrance(&self, pixels: &Tensor, keep: Option<&Tensor>, patches: &Patches) -> TensorResult<Trunk> {
        self.embed(pixels, keep, patches)
    }

    /// From the middle of the tower to projected features.
    ///
    /// # Shapes
    /// [B, T, D] → [B, P]
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn finish<'a>(&'a self, trunk: Trunk, patches: &'a Patches, tape: Option<&Tape<'a>>) -> TensorResult<Tensor> {
        let pooled = block::pooled(&self.blocks, trunk, patches, tape)?;
        let pooled = self.post_norm.forward(&pooled.squeeze(1)?, patches)?;
        let features = self.projection.forward(&pooled, patches)?;
        patches.features(self.features, features)
    }

    /// [`VisionTower::finish`] that keeps every token, normed as the class token is.
    ///
    /// # Shapes
    /// [B, T, D] → tokens [B, T, D] and where each row is pooled
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn finish_tokens<'a>(&'a self, trunk: Trunk, patches: &'a Patches, tape: Option<&Tape<'a>>) -> TensorResult<Sequence> {
        let Sequence { x, pool } = block::whole(&self.blocks, trunk, patches, tape)?;
        Ok(Sequence { x: self.post_norm.forward(&x, patches)?, pool })
    }

    /// What [`VisionTower::finish_tokens`] gives, pooled and projected.
    ///
    /// # Shapes
    /// [B, T, D] → [B, P]
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn project(&self, tokens: &Sequence, patches: &Patches) -> TensorResult<Tensor> {
        let features = self.projection.forward(&block::pick(&tokens.x, &tokens.pool)?.squeeze(1)?, patches)?;
        patches.features(self.features, features)
    }

    /// How many blocks there are.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.blocks.len()
    }

    /// The last hidden state of every token (HF's `last_hidden_state`), before the final norm.
    ///
    /// # Shapes
    /// `pixels` [B, 3, H, W] → [B, 1 + patches, D]
    ///
    /// # Errors
    /// When the image size is not the model's.
    pub fn tokens(&self, pixels: &Tensor, patches: &Patches) -> TensorResult<Tensor> {
        Ok(self.trunk(pixels, self.blocks.len(), patches)?.x)
    }

    /// Class token and patches with positions, normed.
    fn embed(&self, pixels: &Tensor, keep: Option<&Tensor>, patches: &Patches) -> TensorResult<Trunk> {
        let dim = self.patch.weight.1.dim(0)?;
        let mut cells = self.unfold(pixels)?;
        let (batch, count, width) = cells.dims3()?;
        let table = self.position.table(patches)?;
        let positions = match keep {
            None => table.narrow(0, 1, count)?.unsqueeze(0)?,
            Some(keep) => {
                let offsets = Tensor::arange(0u32, batch as u32, pixels.device())?.affine(count as f64, 0.0)?.unsqueeze(1)?;
                let rows = keep.broadcast_add(&offsets)?;
                cells = ops::embedding(&cells.reshape((batch * count, width))?, &rows)?;
                ops::embedding(&table, &(keep + 1.0)?)?
            }
        };
        // The convolution of stride P is a product over unfolded patches.
        let x = self.patch.forward(&cells, patches)?;
        let x = x.broadcast_add(&positions)?;
        let class = patches.weight(self.class.0, &self.class.1)?;
        // A view, since candle would hand a frozen summand itself a gradient.
        let first = (class.reshape((1, dim))? + table.narrow(0, 0, 1)?)?;
        let first = first.reshape((1, 1, dim))?.broadcast_as((batch, 1, dim))?;
        let x = Tensor::cat(&[&first, &x], 1)?;
        let embedded = Embedded { x, pool: Vec::new(), names: Vec::new(), images: None };
        let x = self.pre_norm.forward(&patches.embed(self.entrance, embedded)?.x, patches)?;
        Ok(Trunk { x, pool: Vec::new(), mask: None, depth: 0 })
    }

    /// [B, 3, H, W] → [B, patches, 3·P·P], in the order of the convolution's kernel.
    fn unfold(&self, pixels: &Tensor) -> TensorResult<Tensor> {
        let (batch, channels, height, width) = pixels.dims4()?;
        let (side, p) = (self.config.image_size, self.config.patch_size);
        if (height, width) != (side, side) {
            candle_core::bail!("images have {height}×{width} pixels, the model takes {side}×{side}");
        }
        let n = side / p;
        pixels.narrow(2, 0, n * p)?.narrow(3, 0, n * p)?.reshape((batch, channels, n, p, n, p))?.permute((0, 2, 4, 1, 3, 5))?.reshape((
            batch,
            n * n,
            channels * p * p,
        ))
    }
}
