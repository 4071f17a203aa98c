//! Codes that nothing is near learn nothing. Ours, not the authors': they become encoder outputs of the batch.

use crate::device::Context;
use crate::device::scratch::Doubles;
use crate::error::{Error, Result};
use crate::nn::Source;
use crate::stages::stage_a::StageAConfig;
use crate::tensor::Tensor;
use crate::training::draws::{Draws, Use};
use crate::training::objectives::stage_a::Reconstruction;
use crate::training::options::TrainOptions;
use crate::training::parameters::Parameters;

use super::super::{Commit, Pass};

/// The parameter that holds the codes.
const CODES: &str = "stage_a.codebook.weight";

/// The fewest steps without use after which a code is dead.
const IDLE_STEPS: f64 = 100.0;
/// The fewest encoder outputs per code that a dead one has seen pass by: one that is used a twentieth as often as the
/// average is taken for dead less than once in a hundred times.
const IDLE_OUTPUTS_PER_CODE: f64 = 100.0;
/// Counts stop here, where `F32` still holds them exactly.
const IDLE_MAX: f64 = 16_777_216.0;

/// What the counts are called in a checkpoint.
const IDLE: &str = "codebook_idle_steps";

/// Which codes are in use, and what becomes of the others.
pub(super) struct Codebook {
    codes: usize,
    width: usize,
    revive: bool,
    /// Steps since each code was the nearest of something, `F32 [codes]`.
    idle: Tensor,
    /// Encoder outputs of this step, and which codes were nearest.
    seen: Vec<(Tensor, Tensor)>,
    /// What this step leaves: counts, and vectors for dead codes.
    outcome: Option<(Tensor, Vec<usize>, Doubles)>,
}

impl Codebook {
    /// # Errors
    /// `OutOfMemory`.
    pub fn new(config: &StageAConfig, options: &TrainOptions) -> Result<Self> {
        Ok(Codebook {
            codes: config.codebook_size,
            width: config.latent_channels,
            revive: options.revive_codes,
            idle: Tensor::from_slice(&[config.codebook_size], &vec![0f32; config.codebook_size])?,
            seen: Vec::new(),
            outcome: None,
        })
    }

    /// Forgets what a step has left behind that came to nothing.
    pub fn begin(&mut self) {
        self.seen.clear();
        self.outcome = None;
    }

    /// Remembers what the encoder gave, and where it went.
    pub fn note(&mut self, made: &Reconstruction) {
        if self.revive {
            self.seen.push((made.encoded.constant(), made.tokens.clone()));
        }
    }

    /// Makes every code an encoder output of all ranks, drawn at random: before the first step of a network that has
    /// learnt nothing.
    ///
    /// # Errors
    /// Those of the sum over ranks; `OutOfMemory`.
    pub fn fill(&mut self, pass: &Pass, encoded: &Tensor, parameters: &mut Parameters) -> Result<()> {
        let all: Vec<usize> = (0..self.codes).collect();
        let draws = Draws { first: pass.step, count: 1, ..pass.draws };
        let commit = Commit { options: pass.options, step: pass.step, reduce: pass.reduce };
        let vectors = self.drawn(pass.cx, &commit, draws, &[encoded], &all)?;
        self.write(parameters, &all, &vectors)?;
        parameters.round_to(pass.options.compute_dtype)
    }

    /// Counts on, and finds encoder outputs for dead codes.
    ///
    /// # Errors
    /// Those of the sum over ranks; `OutOfMemory`.
    pub fn sum_up(&mut self, cx: &Context, pass: &Commit) -> Result<()> {
        let seen = std::mem::take(&mut self.seen);
        if !self.revive {
            return Ok(());
        }
        let mut used = Doubles::new(cx.device(), "used codes", self.codes)?;
        used.values_mut().fill(0.0);
        for (_, tokens) in &seen {
            for &token in tokens.slice::<i64>()? {
                used.values_mut()[token as usize] += 1.0;
            }
        }
        if let Some(reduce) = pass.reduce {
            reduce.sum_f64(used.values_mut())?;
        }
        let outputs: f64 = used.values().iter().sum();
        let patience =
            (IDLE_OUTPUTS_PER_CODE * self.codes as f64 / outputs.max(1.0)).clamp(IDLE_STEPS, IDLE_MAX);
        let mut idle = self.idle.detached()?;
        let mut dead = Vec::new();
        for (code, (idle, &uses)) in idle.slice_mut::<f32>()?.iter_mut().zip(used.values()).enumerate() {
            *idle = if uses > 0.0 { 0.0 } else { (f64::from(*idle) + 1.0).min(IDLE_MAX) as f32 };
            if f64::from(*idle) >= patience {
                *idle = 0.0;
                dead.push(code);
            }
        }
        let draws = Draws { seed: pass.options.seed, first: pass.step, count: 1 };
        let encoded: Vec<&Tensor> = seen.iter().map(|(encoded, _)| encoded).collect();
        let vectors = self.drawn(cx, pass, draws, &encoded, &dead)?;
        self.outcome = Some((idle, dead, vectors));
        Ok(())
    }

    /// Puts dead codes back to life.
    ///
    /// # Errors
    /// `Internal` while a network is loaded.
    pub fn update(&mut self, parameters: &mut Parameters) -> Result<()> {
        let Some((idle, dead, vectors)) = self.outcome.take() else { return Ok(()) };
        self.idle = idle;
        self.write(parameters, &dead, &vectors)
    }

    /// For each of `codes` an encoder output of all ranks, the same on each.
    fn drawn(
        &self,
        cx: &Context,
        pass: &Commit,
        draws: Draws,
        encoded: &[&Tensor],
        codes: &[usize],
    ) -> Result<Doubles> {
        let own: usize = encoded.iter().map(|e| e.elements() / self.width).sum();
        let (ranks, rank) = pass.reduce.map_or((1, 0), |reduce| (reduce.ranks(), reduce.rank()));
        let bound = u32::try_from(own * ranks).unwrap_or(u32::MAX);
        let generator = draws.first(Use::Codes);
        let mut vectors = Doubles::new(cx.device(), "codes", codes.len() * self.width)?;
        vectors.values_mut().fill(0.0);
        for (vector, &code) in vectors.values_mut().chunks_exact_mut(self.width).zip(codes) {
            // What lies on another rank is left for that one to give.
            let number = generator.below(code as u64, bound) as usize;
            if number / own.max(1) == rank {
                let found = row(encoded, number % own.max(1), self.width)?;
                vector.iter_mut().zip(found).for_each(|(out, x)| *out = f64::from(*x));
            }
        }
        match pass.reduce {
            Some(reduce) if !codes.is_empty() => reduce.sum_f64(vectors.values_mut())?,
            _ => {}
        }
        Ok(vectors)
    }

    fn write(&self, parameters: &mut Parameters, codes: &[usize], vectors: &Doubles) -> Result<()> {
        if codes.is_empty() {
            return Ok(());
        }
        let place = parameters.place(CODES).ok_or_else(|| Error::internal(CODES, "no parameter"))?;
        let values = parameters.values_mut(place)?;
        for (vector, &code) in vectors.values().chunks_exact(self.width).zip(codes) {
            let row = &mut values[code * self.width..][..self.width];
            row.iter_mut().zip(vector).for_each(|(out, x)| *out = *x as f32);
        }
        Ok(())
    }

    pub fn state(&self) -> Vec<(String, Tensor)> {
        vec![(IDLE.into(), self.idle.clone())]
    }

    /// The counts of a checkpoint.
    ///
    /// # Errors
    /// `Format` if they are missing or those of another codebook.
    pub fn read(&self, state: &dyn Source) -> Result<Tensor> {
        state.tensor(IDLE, self.idle.dims())?.detached()
    }

    pub fn restore(&mut self, idle: Tensor) {
        self.begin();
        self.idle = idle;
    }
}

/// Row `number` of several tensors, one after the other.
fn row<'a>(parts: &[&'a Tensor], mut number: usize, width: usize) -> Result<&'a [f32]> {
    for part in parts {
        let rows = part.elements() / width;
        if number < rows {
            return Ok(&part.slice::<f32>()?[number * width..][..width]);
        }
        number -= rows;
    }
    Err(Error::internal("codes", "a row beyond the batch"))
}
