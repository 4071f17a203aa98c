use super::*;
use crate::device::Device;

fn cx() -> Context {
    Context::new(&Device::cpu(2).unwrap())
}

fn vector(values: &[f32]) -> Tensor {
    Tensor::from_slice(&[values.len()], values).unwrap()
}

/// a * b, element by element.
fn product(cx: &Context, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    fn times(a: &Tensor, b: &Tensor) -> Tensor {
        let [a, b] = [a, b].map(|t| t.slice::<f32>().unwrap());
        vector(&a.iter().zip(b).map(|(a, b)| a * b).collect::<Vec<_>>())
    }
    record(cx, times(a, b), &[Some(a), Some(b)], || {
        let (a, b) = (a.clone(), b.clone());
        move |cx, flow| {
            flow.give(cx, a.tracked(), |g| Ok(times(g, &b)))?;
            flow.give(cx, b.tracked(), |g| Ok(times(g, &a)))
        }
    })
}

#[test]
fn an_input_used_twice_gets_both_gradients() {
    let (cx, tape) = (cx(), Tape::new());
    let x = leaf(&vector(&[2., 3.]), 7);
    let recording = tape.attach(&cx);
    let square = product(&recording, &x, &x).unwrap();
    let cube = product(&recording, &square, &x).unwrap();
    let mut found = Gradients::default();
    tape.backward(&cx, &[(&cube, vector(&[1., 10.]))], &mut found).unwrap();
    assert_eq!(found.get(7).unwrap().slice::<f32>().unwrap(), [12., 270.]);
}

#[test]
fn a_view_gets_its_part() {
    let (cx, tape) = (cx(), Tape::new());
    let whole = leaf(&vector(&[1., 2., 3., 4.]), 0);
    let part = whole.reshape(&[2, 2]).unwrap().narrow(1, 1).unwrap().reshape(&[2]).unwrap();
    let y = product(&tape.attach(&cx), &part, &vector(&[5., 6.])).unwrap();
    let mut found = Gradients::default();
    tape.backward(&cx, &[(&y, vector(&[1., 1.]))], &mut found).unwrap();
    assert_eq!(found.get(0).unwrap().slice::<f32>().unwrap(), [0., 0., 5., 6.]);
}

#[test]
fn gradients_go_on_summing_over_tapes() {
    let cx = cx();
    let x = leaf(&vector(&[3.]), 0);
    let mut found = Gradients::default();
    for _ in 0..2 {
        let tape = Tape::new();
        let y = product(&tape.attach(&cx), &x, &vector(&[4.])).unwrap();
        tape.backward_from(&cx, &y, 0.5, &mut found).unwrap();
    }
    assert_eq!(found.get(0).unwrap().slice::<f32>().unwrap(), [4.]);
}

#[test]
fn a_leaf_is_complete_once_and_after_its_last_use() {
    let (cx, tape) = (cx(), Tape::new());
    let (a, b) = (leaf(&vector(&[2.]), 0), leaf(&vector(&[3.]), 1));
    let recording = tape.attach(&cx);
    let y = product(&recording, &a, &b).unwrap();
    let z = product(&recording, &y, &a).unwrap();
    let mut seen = Vec::new();
    let mut complete = |leaf: usize, gradient: &Tensor| {
        seen.push((leaf, gradient.slice::<f32>()?[0]));
        Ok(())
    };
    let seeds = [(&z, vector(&[1.]))];
    tape.backward_watched(&cx, &seeds, &mut Gradients::default(), &mut complete).unwrap();
    assert_eq!(seen, [(0, 12.), (1, 4.)]);
}

#[test]
fn recomputing_changes_no_gradient() {
    let cx = cx();
    let (x, w) = (leaf(&vector(&[2., 5.]), 0), leaf(&vector(&[3., 7.]), 1));
    let mut both = Vec::new();
    for tape in [Tape::new(), Tape::recomputing()] {
        let recording = tape.attach(&cx);
        let first = product(&recording, &x, &w).unwrap();
        let held = w.clone();
        let block = move |cx: &Context, inputs: &[Option<Tensor>]| {
            let x = inputs[0].as_ref().unwrap();
            product(cx, &product(cx, x, &held)?, x)
        };
        let y = recompute(&recording, &[Some(&first)], block).unwrap();
        let mut found = Gradients::default();
        let mut complete = Vec::new();
        let seeds = [(&y, vector(&[1., 1.]))];
        tape.backward_watched(&cx, &seeds, &mut found, &mut |leaf, _| {
            complete.push(leaf);
            Ok(())
        })
        .unwrap();
        let of = |i| found.get(i).unwrap().slice::<f32>().unwrap().to_vec();
        complete.sort_unstable();
        both.push((of(0), of(1), complete));
    }
    // d/dx (x w)^2 w = 2 x w^3; d/dw = 3 x^2 w^2.
    assert_eq!(both[0].0, [108., 3430.]);
    assert_eq!(both[0].1, [108., 3675.]);
    assert_eq!(both[0], both[1]);
}

#[test]
fn a_missing_gradient_is_an_error() {
    let cx = cx();
    let x = leaf(&vector(&[1.]), 0);
    let (one, other) = (Tape::new(), Tape::new());
    let y = product(&one.attach(&cx), &x, &x).unwrap();
    assert!(product(&other.attach(&cx), &y, &x).is_err(), "of another tape");
    assert!(refuse(&one.attach(&cx), "an op", &[&y]).is_err());
    assert!(refuse(&cx, "an op", &[&y]).is_ok(), "nothing records");
    assert!(other.backward(&cx, &[(&vector(&[1.]), vector(&[1.]))], &mut Gradients::default()).is_err());
    let mut found = Gradients::default();
    one.backward_from(&cx, &y, 1.0, &mut found).unwrap();
    assert!(found.expect_all([(0, "x")]).is_ok());
    let error = found.expect_all([(0, "x"), (1, "blocks.0.weight")]).unwrap_err();
    assert!(error.to_string().contains("blocks.0.weight"), "{error}");
}
