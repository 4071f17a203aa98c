//! A training run on the disk: everything that the next step depends on, in one folder that is replaced as a whole.

use std::collections::HashMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::optimizer::Moments;
use super::parameters::Role;
use super::trainer::{LISTS_BYTES, Progress, Trainer};
use crate::device::threads::run_apart_with_reserve;
use crate::error::{Error, Result};
use crate::files::{self, replace_folder, whole_folder};
use crate::tensor::Tensor;
use crate::weights::{Weights, write_safetensors};

/// What is written; a reader refuses others.
const FORMAT_VERSION: u32 = 1;

/// The files of a checkpoint.
const STATE: &str = "state.json";
const PARAMETERS: &str = "parameters.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const AVERAGE: &str = "average.safetensors";
const TASK: &str = "task.safetensors";

/// The largest `state.json`.
const STATE_MAX_BYTES: usize = 1 << 20;

#[derive(Serialize, Deserialize)]
struct State {
    format_version: u32,
    stage: String,
    progress: Progress,
    /// Steps that changed the weights.
    optimizer_steps: u64,
    /// Where the data loader stood.
    data: Option<serde_json::Value>,
}

impl Trainer {
    /// Writes everything that the next step depends on to `folder`, which is replaced as a whole: a crash or an error
    /// at any moment leaves what was there.
    ///
    /// # Errors
    /// `Io`, also for a full disk.
    pub fn save(&self, folder: &Path) -> Result<()> {
        run_apart_with_reserve("a checkpoint", LISTS_BYTES, || {
            replace_folder(folder, |new| self.write_checkpoint(new))
        })
    }

    fn write_checkpoint(&self, folder: &Path) -> Result<()> {
        let list = self.parameters.list();
        let changing = list.iter().filter(|p| p.role != Role::Frozen);
        write_safetensors(&folder.join(PARAMETERS), changing.map(|p| (p.name.clone(), p.master())))?;
        let moments = self.moments.of.iter().flat_map(|(&place, moments)| {
            let name = &list[place].name;
            moments
                .iter()
                .zip(["first", "second"])
                .map(move |(moment, kind)| (format!("{kind}.{name}"), moment))
        });
        write_safetensors(&folder.join(OPTIMIZER), moments)?;
        let average = self.average.of.iter().map(|(&place, average)| (list[place].name.clone(), average));
        write_safetensors(&folder.join(AVERAGE), average)?;
        let task = self.task.state();
        write_safetensors(&folder.join(TASK), task.iter().map(|(name, tensor)| (name.clone(), tensor)))?;
        let state = State {
            format_version: FORMAT_VERSION,
            stage: self.stage_name(),
            progress: self.progress,
            optimizer_steps: self.moments.steps,
            data: self.data_position.clone(),
        };
        let path = folder.join(STATE);
        let text =
            serde_json::to_vec_pretty(&state).map_err(|e| Error::internal("a checkpoint", e.to_string()))?;
        std::fs::write(&path, text).map_err(|source| Error::io(path, source))
    }

    /// Takes up where [`Trainer::save`] stood: the following steps are those that would have followed then, bit for
    /// bit on the same kind of processor.
    ///
    /// # Errors
    /// `Io`; `Format`, naming the file and the tensor or field, for a checkpoint of another stage or of networks of
    /// other sizes. After an error the trainer is as it was.
    pub fn load(&mut self, folder: &Path) -> Result<()> {
        run_apart_with_reserve("a checkpoint", LISTS_BYTES, || self.load_here(&whole_folder(folder)?))
    }

    fn load_here(&mut self, folder: &Path) -> Result<()> {
        let state = self.read_state(&folder.join(STATE))?;
        let open = |name: &str| Weights::open_file(&folder.join(name));
        let list = self.parameters.list();
        let read = |weights: &Weights, name: &str, like: &Tensor| {
            weights.tensor_shaped(name, like.dims())?.detached()
        };

        let weights = open(PARAMETERS)?;
        let changing = list.iter().enumerate().filter(|(_, p)| p.role != Role::Frozen);
        let masters = changing
            .map(|(place, p)| Ok((place, read(&weights, &p.name, p.master())?)))
            .collect::<Result<Vec<_>>>()?;
        let weights = open(OPTIMIZER)?;
        let mut moments = Moments { steps: state.optimizer_steps, of: HashMap::new() };
        if moments.steps > 0 {
            for place in self.parameters.trained() {
                let moment = |kind: &str| {
                    read(&weights, &format!("{kind}.{}", list[place].name), list[place].master())
                };
                moments.of.insert(place, [moment("first")?, moment("second")?]);
            }
        }
        let weights = open(AVERAGE)?;
        let average = self
            .parameters
            .trained()
            .map(|place| Ok((place, read(&weights, &list[place].name, list[place].master())?)))
            .collect::<Result<HashMap<_, _>>>()?;
        let task = open(TASK)?;

        self.task.restore(&task)?;
        self.task.unload();
        for (place, master) in masters {
            self.parameters.values_mut(place)?.copy_from_slice(master.slice()?);
        }
        self.moments = moments;
        self.average.of = average;
        self.progress = state.progress;
        self.data_position = state.data;
        self.reload()
    }

    fn read_state(&self, path: &Path) -> Result<State> {
        let content = files::read(path, STATE_MAX_BYTES)?;
        let place = || path.display().to_string();
        let state: State = serde_json::from_slice(content.bytes())
            .map_err(|error| Error::format(place(), "the state of a training run", error))?;
        if state.format_version != FORMAT_VERSION {
            let found = state.format_version;
            return Err(Error::format(
                format!("{}: format_version", place()),
                FORMAT_VERSION.to_string(),
                found,
            ));
        }
        if state.stage != self.stage_name() {
            return Err(Error::format(format!("{}: stage", place()), self.stage_name(), state.stage));
        }
        Ok(state)
    }

    fn stage_name(&self) -> String {
        format!("{:?}", self.options.goal)
    }
}
