//! The numbers that training changes: `f32` copies of a model's weights, found by letting the networks load; what is
//! frozen stays where it lies.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use half::{bf16, f16};

use crate::device::Context;
use crate::error::{Error, Result};
use crate::nn::{LowRank, Params, RunningUpdate, Source};
use crate::ops::adamw::approach;
use crate::ops::widen::widen;
use crate::tensor::autograd::{self, Gradients};
use crate::tensor::{DType, Tensor};

/// What training does to a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The optimiser changes it.
    Trained,
    /// A running statistic of a BatchNorm, or a vector of a spectral norm: it follows, and has no gradient.
    Statistic,
    /// It stays as it is.
    Frozen,
}

/// One tensor of a network under its structural name.
#[derive(Debug)]
pub struct Parameter {
    /// The name that layers ask for.
    pub name: String,
    /// What training does to it.
    pub role: Role,
    /// `F32`, in memory of its own; of what was added frozen, the tensor of the file.
    master: Tensor,
    /// What the networks compute with, if that is another type than `F32`.
    working: Option<Tensor>,
}

/// The parameters of the networks that one trainer changes, in the order in which the networks load them: the walk
/// over names that loading is also serves the optimiser, the average, checkpoints and export.
///
/// As a [`Source`] it hands out leaves of the tape, numbered by their places in the list. Networks that were loaded
/// from it share its memory, so they must be gone before [`Parameters::values_mut`], and are loaded anew
/// afterwards: that costs a list of names, no numbers.
#[derive(Debug, Default)]
pub struct Parameters {
    list: Vec<Parameter>,
    by_name: HashMap<String, usize>,
    /// The layers that may have an adapter, as they were asked for.
    adaptable: Vec<String>,
    /// Those that have one.
    adapters: HashMap<String, LowRank>,
}

/// What the matrices of an adapter are called below their layer.
const DOWN: &str = "lora.down";
const UP: &str = "lora.up";

/// The last part of the names of running statistics, and of the vectors that power iterations turn.
const STATISTICS: [&str; 4] = ["running_mean", "running_var", "weight_u", "weight_v"];

impl Parameters {
    /// Adds copies of everything that `load` asks of `source`, below `prefix`. What is frozen is not copied: it stays
    /// where it lies, in its type, for good.
    ///
    /// # Errors
    /// Those of `load`; `OutOfMemory`.
    pub fn add<T>(
        &mut self,
        cx: &Context,
        prefix: &str,
        source: &dyn Source,
        role: Role,
        load: impl FnOnce(&Params) -> Result<T>,
    ) -> Result<()> {
        let collector = Collector { source, asked: Mutex::default(), adaptable: Mutex::default() };
        load(&Params::new(&collector))?;
        let asked = collector.asked.into_inner().unwrap_or_else(PoisonError::into_inner);
        let adaptable = collector.adaptable.into_inner().unwrap_or_else(PoisonError::into_inner);
        self.adaptable.extend(adaptable.into_iter().map(|layer| format!("{prefix}.{layer}")));
        for (name, tensor) in asked {
            let statistic = STATISTICS.iter().any(|leaf| name.rsplit('.').next() == Some(leaf));
            let role = if statistic && role == Role::Trained { Role::Statistic } else { role };
            let master = match role {
                Role::Frozen => tensor,
                // Widening an `F32` tensor gives the mapped one: the copy is what may be written.
                Role::Trained | Role::Statistic => widen(cx, &tensor)?.copied(cx)?,
            };
            self.push(format!("{prefix}.{name}"), role, master);
        }
        Ok(())
    }

    /// Gives every layer that may have one a low-rank adapter, which trains: an update of nothing in the beginning.
    /// `init` fills the matrix that narrows the layer's input; its arguments are the number of the layer, that of its
    /// inputs, and the numbers to fill in.
    ///
    /// # Errors
    /// `OutOfMemory`.
    pub fn adapt(
        &mut self,
        cx: &Context,
        adapter: LowRank,
        init: impl Fn(usize, usize, &mut [f32]),
    ) -> Result<()> {
        for (i, layer) in std::mem::take(&mut self.adaptable).into_iter().enumerate() {
            let weight = self.place(&format!("{layer}.weight")).map(|place| self.list[place].master.shape());
            let Some(&[outputs, inputs]) = weight.as_ref().map(|shape| shape.dims()) else {
                return Err(Error::internal("an adapter", format!("{layer} has no matrix")));
            };
            let zeros =
                |rows, columns| Tensor::zeros(cx, "an adapter", &[rows, columns], DType::F32)?.copied(cx);
            let mut down = zeros(adapter.rank, inputs)?;
            init(i, inputs, down.slice_mut()?);
            self.push(format!("{layer}.{DOWN}"), Role::Trained, down);
            self.push(format!("{layer}.{UP}"), Role::Trained, zeros(outputs, adapter.rank)?);
            self.adapters.insert(layer, adapter);
        }
        Ok(())
    }

    /// The layers that have an adapter, with the places of its matrices: down, then up.
    pub fn adapters(&self) -> impl Iterator<Item = (&str, LowRank, [usize; 2])> {
        let mut all: Vec<_> = self
            .adapters
            .iter()
            .filter_map(|(layer, adapter)| {
                let place = |leaf| self.place(&format!("{layer}.{leaf}"));
                Some((layer.as_str(), *adapter, [place(DOWN)?, place(UP)?]))
            })
            .collect();
        all.sort_unstable_by_key(|(_, _, places)| *places);
        all.into_iter()
    }

    /// Adds one parameter, `F32` and the only owner of its memory unless it is frozen. One of that name is replaced.
    pub fn push(&mut self, name: String, role: Role, master: Tensor) {
        let parameter = Parameter { name: name.clone(), role, master, working: None };
        match self.by_name.get(&name) {
            Some(&place) => self.list[place] = parameter,
            None => {
                self.by_name.insert(name, self.list.len());
                self.list.push(parameter);
            }
        }
    }

    /// All, in order; the place is the number of the leaf.
    pub fn list(&self) -> &[Parameter] {
        &self.list
    }

    /// The place of a parameter.
    pub fn place(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// The places of those that the optimiser changes.
    pub fn trained(&self) -> impl Iterator<Item = usize> + '_ {
        self.list.iter().enumerate().filter(|(_, p)| p.role == Role::Trained).map(|(place, _)| place)
    }

    /// The numbers of a parameter, to change. Networks loaded from here must be gone.
    ///
    /// # Errors
    /// `Internal` if one is not.
    pub fn values_mut(&mut self, place: usize) -> Result<&mut [f32]> {
        self.list[place].master.slice_mut()
    }

    /// A parameter, to change. Networks loaded from here must be gone.
    pub fn master_mut(&mut self, place: usize) -> &mut Tensor {
        &mut self.list[place].master
    }

    /// Running statistics take over what BatchNorms saw, with the unbiased variance, as PyTorch does. Networks loaded
    /// from here must be gone.
    ///
    /// # Errors
    /// `Internal` if one is not, or for a layer that is none of these.
    pub fn follow(&mut self, cx: &Context, seen: &[RunningUpdate]) -> Result<()> {
        for RunningUpdate { name, momentum, statistics } in seen {
            let count = statistics.count as f32;
            let unbiased = count / (count - 1.0).max(1.0);
            let both = [("mean", &statistics.mean, 1.0), ("var", &statistics.variance, unbiased)];
            for (leaf, values, factor) in both {
                let name = format!("{name}.running_{leaf}");
                let Some(place) = self.place(&name) else {
                    return Err(Error::internal("batch norm", format!("{name} is no parameter")));
                };
                let running = self.master_mut(place);
                running.settle(cx)?;
                approach(cx, running, values, [factor, *momentum])?;
            }
        }
        Ok(())
    }

    /// Freezes or thaws those whose name `which` picks; statistics stay what they are. What was added frozen has no
    /// memory to be trained in, and must not be thawed.
    pub fn set_role(&mut self, role: Role, which: impl Fn(&str) -> bool) {
        let chosen = self.list.iter_mut().filter(|p| p.role != Role::Statistic && which(&p.name));
        chosen.for_each(|p| p.role = role);
    }

    /// Lets the networks compute with weights of another type, rounded from the masters: after every change anew.
    ///
    /// # Errors
    /// `InvalidArgument` for a type that is not a float; `OutOfMemory`.
    pub fn round_to(&mut self, dtype: DType) -> Result<()> {
        for parameter in &mut self.list {
            parameter.working = match dtype {
                DType::F32 => None,
                // What is frozen is computed with as the file has it.
                _ if parameter.role == Role::Frozen => None,
                // A GPU rounds factors as it reads them.
                _ if parameter.master.stream().is_some() => None,
                // Statistics and other vectors are few: only matrices are worth rounding.
                _ if parameter.role == Role::Statistic || parameter.master.dims().len() < 2 => None,
                _ => Some(rounded(&parameter.master, dtype, parameter.working.take())?),
            };
        }
        Ok(())
    }

    /// # Errors
    /// `Internal`, naming the first trained parameter that no gradient reached.
    pub fn expect_gradients(&self, gradients: &Gradients) -> Result<()> {
        gradients.expect_all(self.trained().map(|place| (place, self.list[place].name.as_str())))
    }
}

impl Parameter {
    /// The numbers, `F32`; of what was added frozen, as the file has them.
    pub fn master(&self) -> &Tensor {
        &self.master
    }
}

impl Source for Parameters {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let Some(&place) = self.by_name.get(name) else {
            return Err(Error::internal("parameters", format!("{name} was not collected")));
        };
        let parameter = &self.list[place];
        let tensor = parameter.working.as_ref().unwrap_or(&parameter.master).reshape(shape)?;
        Ok(if parameter.role == Role::Trained { autograd::leaf(&tensor, place) } else { tensor })
    }

    fn has(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    fn adapter(&self, layer: &str) -> Option<LowRank> {
        self.adapters.get(layer).copied()
    }
}

/// The numbers in another type, in `reused` memory if that is free.
fn rounded(x: &Tensor, dtype: DType, reused: Option<Tensor>) -> Result<Tensor> {
    if let Some(rounded) = x.converted_there(dtype)? {
        return Ok(rounded);
    }
    let values = x.slice::<f32>()?;
    let zeros = |dims: &[usize]| match dtype {
        DType::F16 => Tensor::from_slice(dims, &vec![f16::ZERO; x.elements()]),
        DType::BF16 => Tensor::from_slice(dims, &vec![bf16::ZERO; x.elements()]),
        other => Err(Error::argument("compute dtype", "F32, F16 or BF16", other)),
    };
    let mut out = match reused.filter(|t| t.dtype() == dtype && t.elements() == x.elements()) {
        Some(tensor) => tensor,
        None => zeros(x.dims())?,
    };
    match dtype {
        DType::F16 => {
            let out = out.slice_mut::<f16>()?.iter_mut();
            out.zip(values).for_each(|(out, &x)| *out = f16::from_f32(x));
        }
        _ => {
            let out = out.slice_mut::<bf16>()?.iter_mut();
            out.zip(values).for_each(|(out, &x)| *out = bf16::from_f32(x));
        }
    }
    Ok(out)
}

/// Passes questions on and remembers them.
struct Collector<'a> {
    source: &'a dyn Source,
    asked: Mutex<Vec<(String, Tensor)>>,
    /// The layers that asked for an adapter. None is given: training makes its own.
    adaptable: Mutex<Vec<String>>,
}

impl Source for Collector<'_> {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.source.tensor(name, shape)?;
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.push((name.to_owned(), tensor.clone()));
        Ok(tensor)
    }

    fn has(&self, name: &str) -> bool {
        self.source.has(name)
    }

    fn adapter(&self, layer: &str) -> Option<LowRank> {
        self.adaptable.lock().unwrap_or_else(PoisonError::into_inner).push(layer.to_owned());
        None
    }
}
