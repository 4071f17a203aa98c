//! Steps over what a data loader gives, and where it stands in checkpoints.

use super::data::{DataOptions, Loader};
use super::trainer::{TrainMetrics, Trainer};
use crate::error::{Error, Result};
use crate::image::Image;

impl Trainer {
    /// One step over the loader's next batch; nothing after the last one of a single pass. Checkpoints then hold where
    /// the loader stands.
    ///
    /// # Errors
    /// As [`Loader::next_batch`] and [`Trainer::step`]. A batch whose step failed is not given again.
    pub fn step_from(&mut self, loader: &mut Loader) -> Result<Option<TrainMetrics>> {
        let Some(batch) = loader.next_batch()? else { return Ok(None) };
        let images: Vec<&Image> = batch.images.iter().collect();
        let captions: Vec<&str> = batch.captions.iter().map(String::as_str).collect();
        let metrics = self.step(&images, &captions)?;
        self.follow(loader)?;
        Ok(Some(metrics))
    }

    /// Lets checkpoints hold where the loader stands now.
    ///
    /// # Errors
    /// `Internal`.
    pub fn follow(&mut self, loader: &Loader) -> Result<()> {
        let position = serde_json::to_value(loader.position());
        let position = position.map_err(|error| Error::internal("a data position", error.to_string()))?;
        self.set_data_position(Some(position));
        Ok(())
    }

    /// A loader that goes on where the one stood that the checkpoint followed which was loaded last; without one, from
    /// the start.
    ///
    /// # Errors
    /// As [`Loader::resume`]; `Format` if the checkpoint holds something else there.
    pub fn resume_loader(&self, options: &DataOptions) -> Result<Loader> {
        let Some(position) = self.data_position() else { return Loader::new(options) };
        let position = serde_json::from_value(position.clone())
            .map_err(|error| Error::format("a checkpoint: data", "the position of a data loader", error))?;
        Loader::resume(options, &position)
    }
}
