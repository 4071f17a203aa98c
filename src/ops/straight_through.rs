//! The straight-through estimator: through a quantiser, gradients pass as if it were not there (van den Oord et al.
//! 2017, section 3.2; Bengio et al. 2013).

use crate::device::Context;
use crate::error::{Error, Result};
use crate::tensor::Tensor;
use crate::tensor::autograd::record;

/// The numbers of `value`, whose gradient goes unchanged to `source`. None goes to `value`.
///
/// # Shapes
/// `value`, `source` and the result alike.
///
/// # Errors
/// `InvalidArgument` if shapes differ.
pub fn straight_through(cx: &Context, value: &Tensor, source: &Tensor) -> Result<Tensor> {
    let _span = cx.op("straight_through");
    if value.dims() != source.dims() {
        return Err(Error::argument(
            "straight_through",
            format!("the shape {}", source.shape()),
            value.shape(),
        ));
    }
    record(cx, value.constant(), &[Some(source)], || {
        let to = source.tracked();
        move |cx, flow| flow.give(cx, to, |g| Ok(g.clone()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check;
    use crate::tensor::autograd::{Gradients, Tape, leaf};

    #[test]
    fn numbers_come_from_one_and_gradients_go_to_the_other() {
        let (cx, tape) = (check::cx(), Tape::new());
        let [value, source, g] = [1, 2, 3].map(|seed| check::random(&[3, 5], seed));
        let out = straight_through(&tape.attach(&cx), &leaf(&value, 0), &leaf(&source, 1)).unwrap();
        assert!(out.bytes().unwrap() == value.bytes().unwrap());
        let mut found = Gradients::default();
        tape.backward(&cx, &[(&out, g.clone())], &mut found).unwrap();
        assert!(found.get(0).is_none());
        assert!(found.get(1).unwrap().bytes().unwrap() == g.bytes().unwrap());
        assert!(straight_through(&cx, &value, &check::random(&[5, 3], 1)).is_err());
    }
}
