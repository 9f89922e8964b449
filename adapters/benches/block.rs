//! One transformer block, forward and backward: fused operations against the portable
//! compositions and against the bare products.
//!
//! `cargo bench -p peft-adapters --bench block [-- rounds] [-- part of a title or a run's name]`
#![allow(clippy::unwrap_used)]

use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor, Var};
use peft_adapters::ops::{self, Activation, AttentionShape, LowRank};
use rayon::prelude::*;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Clone, Copy)]
struct Size {
    batch: usize,
    tokens: usize,
    width: usize,
    heads: usize,
    rank: usize,
}

impl Size {
    fn rows(&self) -> usize {
        self.batch * self.tokens
    }
}

const VIT_B: Size = Size { batch: 32, tokens: 50, width: 768, heads: 12, rank: 8 };
const TINY: Size = Size { batch: 256, tokens: 65, width: 192, heads: 3, rank: 0 };

fn random(dims: &[usize], scale: f64) -> Tensor {
    (Tensor::randn(0_f32, 1.0, dims, &Device::Cpu).unwrap() * scale).unwrap()
}

/// A weight that is trained in full where there is no rank.
struct Layer {
    w: Tensor,
    b: Tensor,
    lora: Option<[Tensor; 2]>,
}

fn var(t: &Tensor) -> Tensor {
    Var::from_tensor(t).unwrap().as_tensor().clone()
}

impl Layer {
    fn new(size: &Size, dims: [usize; 2], lora: bool) -> Self {
        let (w, b) = (random(&dims, 0.02), random(&dims[..1], 0.02));
        let [w, b] = if size.rank == 0 { [var(&w), var(&b)] } else { [w, b] };
        let factors = || [var(&random(&[size.rank, dims[1]], 0.02)), var(&random(&[dims[0], size.rank], 0.02))];
        let lora = (lora && size.rank > 0).then(factors);
        Self { w, b, lora }
    }

    fn norm(size: &Size) -> Self {
        Self { w: Self::new(size, [size.width, 1], false).w.squeeze(1).unwrap(), ..Self::new(size, [size.width, 1], false) }
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.lora {
            None => ops::linear(x, &self.w, Some(&self.b)),
            Some([a, b]) => {
                let lora = LowRank { a, b, scale: 2.0, dropout: None };
                ops::lora_linear(x, &self.w, Some(&self.b), &lora)
            }
        }
    }
}

struct Block {
    size: Size,
    norms: [Layer; 2],
    qkv: [Layer; 3],
    out: Layer,
    mlp: [Layer; 2],
}

impl Block {
    fn new(size: Size) -> Self {
        let d = size.width;
        let square = |lora| Layer::new(&size, [d, d], lora);
        Self {
            size,
            norms: [Layer::norm(&size), Layer::norm(&size)],
            qkv: [square(true), square(true), square(true)],
            out: square(false),
            mlp: [Layer::new(&size, [4 * d, d], false), Layer::new(&size, [d, 4 * d], false)],
        }
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = ops::layer_norm(x, &self.norms[0].w, &self.norms[0].b, 1e-5)?;
        let [q, k, v] = &self.qkv;
        let (q, k, v) = (q.forward(&h)?, k.forward(&h)?, v.forward(&h)?);
        let shape = AttentionShape { heads: self.size.heads, causal: false, prefix: 0 };
        let x = ops::add(x, &self.out.forward(&ops::attention(&q, &k, &v, &shape, None)?)?)?;
        let h = ops::layer_norm(&x, &self.norms[1].w, &self.norms[1].b, 1e-5)?;
        let h = ops::activation(&self.mlp[0].forward(&h)?, Activation::QuickGelu)?;
        ops::add(&x, &self.mlp[1].forward(&h)?)
    }
}

/// The dense products of a block and its backward pass, into buffers that exist already.
struct Floor {
    size: Size,
    x: Vec<f32>,
    hidden: Vec<f32>,
    y: Vec<f32>,
    w: Vec<f32>,
    scores: Vec<f32>,
}

impl Floor {
    fn new(size: Size) -> Self {
        let (rows, d) = (size.rows(), size.width);
        Self {
            size,
            x: vec![0.5; rows * d],
            hidden: vec![0.5; rows * 4 * d],
            y: vec![0.5; rows * d],
            w: vec![0.5; 4 * d * d],
            scores: vec![0.5; size.batch * size.heads * size.tokens * size.tokens],
        }
    }

    fn run(&mut self) {
        let (rows, d, trained) = (self.size.rows(), self.size.width, self.size.rank == 0);
        for _ in 0..4 {
            product(&mut self.y, &self.x, &self.w, [rows, d, d], false);
            product(&mut self.y, &self.x, &self.w, [rows, d, d], true);
        }
        product(&mut self.hidden, &self.x, &self.w, [rows, 4 * d, d], false);
        product(&mut self.y, &self.hidden, &self.w, [rows, d, 4 * d], false);
        product(&mut self.hidden, &self.x, &self.w, [rows, 4 * d, d], true);
        product(&mut self.y, &self.hidden, &self.w, [rows, d, 4 * d], true);
        if trained {
            for _ in 0..4 {
                weight_product(&mut self.w, &self.x, &self.y, [d, d, rows]);
            }
            weight_product(&mut self.w, &self.hidden, &self.y, [4 * d, d, rows]);
            weight_product(&mut self.w, &self.y, &self.hidden, [d, 4 * d, rows]);
        }
        // Scores and outputs forward, scores again and four gradients backward.
        let (t, head) = (self.size.tokens, d / self.size.heads);
        let piece = (t * d).min(t * head);
        let (x, y) = (&self.x[..piece], &self.y[..piece]);
        self.scores.par_chunks_mut(t * t).for_each_init(
            || vec![0.0; t * head],
            |out, scores| {
                for _ in 0..3 {
                    raw(scores, x, y, [t, t, head], [head, 1, 1, head], gemm::Parallelism::None);
                }
                for _ in 0..4 {
                    raw(out, scores, x, [t, head, t], [t, 1, head, 1], gemm::Parallelism::None);
                }
            },
        );
    }
}

fn product(dst: &mut [f32], x: &[f32], w: &[f32], mnk: [usize; 3], plain: bool) {
    let strides = if plain { [mnk[2], 1, mnk[1], 1] } else { [mnk[2], 1, 1, mnk[2]] };
    raw(dst, x, w, mnk, strides, gemm::Parallelism::Rayon(0));
}

fn weight_product(dst: &mut [f32], dy: &[f32], x: &[f32], mnk: [usize; 3]) {
    raw(dst, dy, x, mnk, [1, mnk[0], mnk[1], 1], gemm::Parallelism::Rayon(0));
}

/// Strides: rows and columns of the left, then of the right operand.
#[allow(unsafe_code, reason = "the product alone, without what `ops` adds")]
fn raw(dst: &mut [f32], x: &[f32], w: &[f32], [m, n, k]: [usize; 3], s: [usize; 4], threads: gemm::Parallelism) {
    assert!(dst.len() >= m * n && x.len() >= m * k && w.len() >= n * k);
    let s = s.map(|s| s as isize);
    // SAFETY: the lengths have just been checked.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            n as isize,
            false,
            x.as_ptr(),
            s[1],
            s[0],
            w.as_ptr(),
            s[3],
            s[2],
            0.0,
            1.0,
            false,
            false,
            false,
            threads,
        );
    }
}

fn step(f: impl Fn() -> Result<Tensor>) {
    let grads = f().unwrap().backward().unwrap();
    std::hint::black_box(&grads);
}

fn ms(f: &mut dyn FnMut()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64() * 1e3
}

type Run<'a> = (&'a str, Box<dyn FnMut() + 'a>);

/// Median and minimum of each, taken in turns so that a busy machine slows all of them.
fn table(title: &str, rounds: usize, runs: &mut [Run<'_>]) {
    let wanted = |name: &str| {
        std::env::args().skip(1).all(|a| a.starts_with("--") || a.parse::<usize>().is_ok() || title.contains(&a) || name.contains(&a))
    };
    let mut runs: Vec<_> = runs.iter_mut().filter(|(name, _)| wanted(name)).collect();
    if runs.is_empty() {
        return;
    }
    let mut times = vec![Vec::new(); runs.len()];
    for round in 0..rounds + 2 {
        for ((_, f), times) in runs.iter_mut().zip(&mut times) {
            let t = ms(f);
            if round >= 2 {
                times.push(t);
            }
        }
    }
    println!("{title:<38}  median ms     min ms   of the first");
    let mut first = 0.0;
    for ((name, _), times) in runs.iter().zip(&mut times) {
        times.sort_by(f64::total_cmp);
        let median = times[times.len() / 2];
        if first == 0.0 {
            first = times[0];
        }
        println!("  {name:<36} {median:>10.2} {:>10.2} {:>13.2}x", times[0], times[0] / first);
    }
}

fn block(title: &str, size: Size, rounds: usize) {
    let block = Block::new(size);
    let x = var(&random(&[size.batch, size.tokens, size.width], 1.0));
    let mut floor = Floor::new(size);
    let with = |portable: bool, f: &dyn Fn()| {
        ops::set_portable(portable);
        f();
        ops::set_portable(false);
    };
    let both = || step(|| block.forward(&x));
    let forward = || drop(block.forward(&x.detach()).unwrap());
    table(
        title,
        rounds,
        &mut [
            ("products alone", Box::new(|| floor.run())),
            ("fused", Box::new(|| with(false, &both))),
            ("portable", Box::new(|| with(true, &both))),
            ("fused, forward of an untracked input", Box::new(|| with(false, &forward))),
        ],
    );
}

fn layers(title: &str, size: Size, rounds: usize) {
    let block = Block::new(size);
    let x = var(&random(&[size.batch, size.tokens, size.width], 1.0));
    let h = var(&random(&[size.batch, size.tokens, 4 * size.width], 1.0));
    let shape = AttentionShape { heads: size.heads, causal: false, prefix: 0 };
    let (rows, d) = (size.rows(), size.width);
    let mut floor = Floor::new(size);
    let mut dw = vec![0.0; d * d];
    table(
        title,
        rounds,
        &mut [
            (
                "square products alone",
                Box::new(|| {
                    product(&mut floor.y, &floor.x, &floor.w, [rows, d, d], false);
                    product(&mut floor.y, &floor.x, &floor.w, [rows, d, d], true);
                    if size.rank == 0 {
                        weight_product(&mut dw, &floor.x, &floor.y, [d, d, rows]);
                    }
                }),
            ),
            ("linear", Box::new(|| step(|| block.out.forward(&x)))),
            ("lora_linear", Box::new(|| step(|| block.qkv[0].forward(&x)))),
            ("layer_norm", Box::new(|| step(|| ops::layer_norm(&x, &block.norms[0].w, &block.norms[0].b, 1e-5)))),
            ("attention", Box::new(|| step(|| ops::attention(&x, &x, &x, &shape, None)))),
            ("quick_gelu of the wide layer", Box::new(|| step(|| ops::activation(&h, Activation::QuickGelu)))),
            ("gelu of the wide layer", Box::new(|| step(|| ops::activation(&h, Activation::Gelu)))),
            ("x + x", Box::new(|| step(|| &x + &x))),
            (
                "layer_norm forward",
                Box::new(|| drop(ops::layer_norm(&x.detach(), &block.norms[0].w.detach(), &block.norms[0].b.detach(), 1e-5))),
            ),
            (
                "attention forward",
                Box::new(|| {
                    let x = x.detach();
                    drop(ops::attention(&x, &x, &x, &shape, None))
                }),
            ),
            ("quick_gelu forward", Box::new(|| drop(ops::activation(&h.detach(), Activation::QuickGelu)))),
        ],
    );
}

/// As the `peft` command does: one pool, of two threads or as many as `THREADS` says, and no
/// pages given back to the system between steps.
#[allow(unsafe_code, reason = "settings of the process, as in `main`")]
fn set_up() {
    const PURGE_DELAY: i32 = 15;
    let threads = std::env::var("THREADS").ok().and_then(|t| t.parse().ok()).unwrap_or(2);
    // SAFETY: no other thread runs yet.
    unsafe {
        std::env::set_var("RAYON_NUM_THREADS", "1");
        libmimalloc_sys::mi_option_set(PURGE_DELAY, -1);
    }
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().unwrap();
}

fn main() {
    set_up();
    let rounds = std::env::args().skip(1).find_map(|a| a.parse().ok()).unwrap_or(15);
    assert_eq!(random(&[1], 1.0).dtype(), DType::F32);
    println!("{} threads", rayon::current_num_threads());
    layers("layers, ViT-B/32, 32 images, LoRA r=8", VIT_B, rounds);
    layers("layers, tiny, 256 images, all trained", TINY, rounds);
    block("block, ViT-B/32, 32 images, LoRA r=8", VIT_B, rounds);
    block("block, tiny, 256 images, all trained", TINY, rounds);
}
