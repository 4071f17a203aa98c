//! What each stage learns by: its loss over one batch, from inputs that are all given. Nothing here draws a random
//! number or changes a weight.

pub mod contrast;
pub mod stage_a;
pub mod stage_b;
pub mod stage_c;
