//! The noise schedule that v2's folders keep beside their networks.

use std::path::Path;

use super::fields::Fields;
use crate::error::Result;

/// The constructor arguments of a schedule (`DDPMWuerstchenScheduler`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SchedulerConfig {
    /// Above 1 more of the time is spent at high noise, below 1 less.
    pub scaler: f32,
    /// The offset of the cosine.
    pub s: f32,
}

impl SchedulerConfig {
    /// The name of the file.
    pub const FILE: &'static str = "scheduler_config.json";

    /// Reads `folder/scheduler_config.json`.
    ///
    /// # Errors
    /// `Io`; `Format`, naming the field.
    pub fn read(folder: &Path) -> Result<Self> {
        let fields = Fields::read(&folder.join(Self::FILE))?;
        fields.expect_class("DDPMWuerstchenScheduler")?;
        Ok(SchedulerConfig {
            scaler: fields.number("scaler", 1.0, 1e-3..=1e3)? as f32,
            s: fields.number("s", 0.008, 1e-6..=1.0)? as f32,
        })
    }
}
