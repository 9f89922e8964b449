//! The text encoder: causal, pooled at the end-of-text token.

use candle_core::{DType, Device, Result as TensorResult, Tensor};
use peft_adapters::layers::{Embedding, LayerNorm, Linear};
use peft_adapters::{ClassName, Embedded, Patches, Sequence, Site, SiteId, SiteKind, Sites, Tape, Tower};

use super::block::{self, Block, BlockShape, Tensors};
use super::config::{ClipConfig, TextConfig};
use super::trunk::Trunk;
use crate::error::Result;

/// Token ids of several texts, padded to one length, and where each is pooled.
#[derive(Debug, Clone)]
pub struct TextBatch {
    /// [N, T] u32.
    pub ids: Tensor,
    /// [N, T] u8, 1 for tokens, 0 for padding; `None` where padding cannot be seen anyway
    /// (it comes after the pooled token and attention is causal).
    pub mask: Option<Tensor>,
    /// The pooled position of each row.
    pub pool: Vec<u32>,
    /// Where the class name stands in each row; empty where texts are no class prompts.
    pub names: Vec<ClassName>,
    /// The normalised feature of the image that each row is encoded for, [N, P]; `None` where texts stand for themselves.
    pub images: Option<Tensor>,
}

impl TextBatch {
    /// Pads to the longest text (`to` = `None`) or to `to` tokens.
    ///
    /// Padding after the pooled token never changes a result, so no mask is made.
    ///
    /// # Errors
    /// When the tensor cannot be made.
    pub fn new(ids: &[Vec<u32>], to: Option<usize>, config: &TextConfig, device: &Device) -> TensorResult<Self> {
        let longest = ids.iter().map(Vec::len).max().unwrap_or(0);
        let len = to.unwrap_or(longest).max(longest).max(1);
        let pool = ids.iter().map(|row| pooled_position(row, config)).collect();
        let flat: Vec<u32> =
            ids.iter().flat_map(|row| row.iter().copied().chain(std::iter::repeat(config.pad_token_id)).take(len)).collect();
        Ok(Self { ids: Tensor::from_vec(flat, (ids.len(), len), device)?, mask: None, pool, names: Vec::new(), images: None })
    }

    /// The same as class prompts.
    #[must_use]
    pub fn with_names(self, names: Vec<ClassName>) -> Self {
        Self { names, ..self }
    }

    /// The same, each row for one image: `images` [N, P], normalised.
    #[must_use]
    pub fn with_images(self, images: Tensor) -> Self {
        Self { images: Some(images), ..self }
    }

    /// Rows with an attention mask of the caller's, [N, T] with 1 for tokens.
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn with_mask(mut self, mask: &Tensor) -> TensorResult<Self> {
        if mask.dims() != self.ids.dims() {
            candle_core::bail!("attention mask {:?} does not fit ids {:?}", mask.dims(), self.ids.dims());
        }
        self.mask = Some(mask.to_dtype(DType::U8)?);
        Ok(self)
    }

    /// Rows `from..from + count`.
    ///
    /// # Errors
    /// When the range is outside.
    pub fn narrow(&self, from: usize, count: usize) -> TensorResult<Self> {
        Ok(Self {
            ids: self.ids.narrow(0, from, count)?,
            mask: self.mask.as_ref().map(|m| m.narrow(0, from, count)).transpose()?,
            pool: self.pool[from..from + count].to_vec(),
            names: self.names.get(from..from + count).unwrap_or_default().to_vec(),
            images: self.images.as_ref().map(|i| i.narrow(0, from, count)).transpose()?,
        })
    }
}

/// transformers' rule: with the legacy `eos_token_id` of 2 the highest id is the end of text,
/// otherwise the first `eos_token_id` is.
fn pooled_position(ids: &[u32], config: &TextConfig) -> u32 {
    let position = if config.eos_token_id == 2 {
        let highest = ids.iter().max();
        ids.iter().position(|id| Some(id) == highest)
    } else {
        ids.iter().position(|&id| id == config.eos_token_id)
    };
    position.unwrap_or(0) as u32
}

/// What of the text tower no training changes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ConstantText {
    /// Leading blocks; 0 where the embedding is trained.
    pub blocks: usize,
    /// All of it: features are the same after every step.
    pub features: bool,
}

/// The text encoder.
#[derive(Debug)]
pub struct TextTower {
    entrance: SiteId,
    token: Embedding,
    position: Embedding,
    blocks: Vec<Block>,
    final_norm: LayerNorm,
    projection: Linear,
    features: SiteId,
}

impl TextTower {
    /// Takes the tensors and registers the sites.
    ///
    /// # Errors
    /// When a tensor is missing or misshapen.
    pub fn new(config: &ClipConfig, tensors: &mut Tensors, sites: &mut Sites) -> Result<Self> {
        let text = &config.text;
        let tower = Tower::Text;
        let mut embedding = |sites: &mut Sites, path: &str| -> Result<Embedding> {
            sites.embedding(path, tower, tensors.take(&format!("{path}.weight"))?).map_err(super::method_error)
        };
        let token = embedding(sites, "text_model.embeddings.token_embedding")?;
        let position = embedding(sites, "text_model.embeddings.position_embedding")?;
        let kind = SiteKind::Embed { dim: text.hidden_size, limit: text.max_position_embeddings };
        let entrance = sites.add(Site { path: "text_model.embeddings".into(), tower, layer: None, kind });
        let shape = BlockShape {
            tower,
            dim: text.hidden_size,
            heads: text.num_attention_heads,
            eps: text.layer_norm_eps,
            act: text.hidden_act,
            causal: true,
        };
        let blocks = (0..text.num_hidden_layers)
            .map(|i| Block::new(&format!("text_model.encoder.layers.{i}"), i, shape, tensors, sites))
            .collect::<Result<_>>()?;
        let pair = tensors.pair("text_model.final_layer_norm")?;
        let final_norm = sites.layer_norm("text_model.final_layer_norm", tower, None, pair, text.layer_norm_eps);
        let weight = tensors.take("text_projection.weight")?;
        let projection = sites.linear("text_projection", tower, None, weight, None).map_err(super::method_error)?;
        let features =
            sites.add(Site { path: "text_model".into(), tower, layer: None, kind: SiteKind::Features { dim: config.projection_dim } });
        Ok(Self { entrance, token, position, blocks, final_norm, projection, features })
    }

    /// Projected text features, not normalised. With a tape, blocks keep only their input for the backward pass.
    ///
    /// # Shapes
    /// [N, T] ids → [N, P]
    ///
    /// # Errors
    /// When there are more tokens than positions.
    pub fn forward<'a>(&'a self, batch: &TextBatch, patches: &'a Patches, tape: Option<&Tape<'a>>) -> TensorResult<Tensor> {
        self.finish(self.embed(batch, patches)?, patches, tape)
    }

    /// What nothing that is trained reaches. The patches are prepared for evaluation: what a step drops tells nothing of the next.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn constant(&self, config: &TextConfig, patches: &Patches) -> TensorResult<ConstantText> {
        let probe = TextBatch::new(&[vec![0, config.eos_token_id]], None, config, self.token.weight.1.device())?;
        let probe = probe.with_names(vec![ClassName { class: 0, start: 1, len: 0 }]);
        Ok(ConstantText {
            blocks: self.embed(&probe, patches)?.constant(&self.blocks, patches)?,
            features: !self.forward(&probe, patches, None)?.track_op(),
        })
    }

    /// Texts up to block `depth`.
    ///
    /// # Shapes
    /// [N, T] ids → [N, T, D]
    ///
    /// # Errors
    /// When there are more tokens than positions.
    pub fn trunk(&self, batch: &TextBatch, depth: usize, patches: &Patches) -> TensorResult<Trunk> {
        self.embed(batch, patches)?.through(&self.blocks[..depth.min(self.blocks.len())], patches)
    }

    /// From the middle of the tower to projected features.
    ///
    /// # Shapes
    /// [N, T, D] → [N, P]
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn finish<'a>(&'a self, trunk: Trunk, patches: &'a Patches, tape: Option<&Tape<'a>>) -> TensorResult<Tensor> {
        let pooled = block::pooled(&self.blocks, trunk, patches, tape)?;
        // The norm works on each token alone, so pooling first gives the same.
        let pooled = self.final_norm.forward(&pooled.squeeze(1)?, patches)?;
        let features = self.projection.forward(&pooled, patches)?;
        patches.features(self.features, features)
    }

    /// [`TextTower::finish`] that keeps every token, after the final norm.
    ///
    /// # Shapes
    /// [N, T, D] → tokens [N, T, D] and where each row is pooled, which is its last token
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn finish_tokens<'a>(&'a self, trunk: Trunk, patches: &'a Patches, tape: Option<&Tape<'a>>) -> TensorResult<Sequence> {
        let Sequence { x, pool } = block::whole(&self.blocks, trunk, patches, tape)?;
        Ok(Sequence { x: self.final_norm.forward(&x, patches)?, pool })
    }

    /// What [`TextTower::finish_tokens`] gives, pooled and projected.
    ///
    /// # Shapes
    /// [N, T, D] → [N, P]
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn project(&self, tokens: &Sequence, patches: &Patches) -> TensorResult<Tensor> {
        let features = self.projection.forward(&block::pick(&tokens.x, &tokens.pool)?.squeeze(1)?, patches)?;
        patches.features(self.features, features)
    }

    /// The last hidden state of every token after the final norm (HF's `last_hidden_state`).
    ///
    /// # Shapes
    /// [N, T] ids → [N, T, D]
    ///
    /// # Errors
    /// When there are more tokens than positions.
    pub fn tokens(&self, batch: &TextBatch, patches: &Patches) -> TensorResult<Tensor> {
        let all = self.trunk(batch, self.blocks.len(), patches)?;
        self.final_norm.forward(&all.x, patches)
    }

    fn embed(&self, batch: &TextBatch, patches: &Patches) -> TensorResult<Trunk> {
        let table = self.position.table(patches)?;
        let x = self.token.forward(&batch.ids, patches)?;
        let words = Embedded { x, pool: batch.pool.clone(), names: batch.names.clone(), images: batch.images.clone() };
        let Embedded { x, pool, .. } = patches.embed(self.entrance, words)?;
        let len = x.dim(1)?;
        if len > table.dim(0)? {
            candle_core::bail!("texts have {len} tokens, the model has {} positions", table.dim(0)?);
        }
        if batch.mask.is_some() && pool != batch.pool {
            candle_core::bail!("an attention mask does not fit texts with learnt context");
        }
        let x = x.broadcast_add(&table.narrow(0, 0, len)?)?;
        Ok(Trunk { x, pool, mask: batch.mask.clone(), depth: 0 })
    }
}
