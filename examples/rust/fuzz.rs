//! Feeds mutated files to every loader: `cargo run --release --example fuzz -- CASES [SEED]`.

#![allow(clippy::expect_used)]

#[path = "../../tests/common/fuzz.rs"]
mod fuzz;

/// Cases between two lines of output.
const BATCH: u64 = 50_000;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default| arguments.next().map_or(default, |text| text.parse().expect("a number"));
    let (cases, seed) = (number(100_000u64), number(1));
    let mut total = fuzz::Report::default();
    let start = std::time::Instant::now();
    for batch in 0..cases.div_ceil(BATCH) {
        let report = fuzz::fuzz_files(BATCH.min(cases - batch * BATCH), seed * 1_000_000 + batch);
        total.cases += report.cases;
        total.accepted += report.accepted;
        total.refused += report.refused;
        total.caught.extend(report.caught);
        total.panics.extend(report.panics);
        let seconds = start.elapsed().as_secs();
        println!(
            "{} cases in {seconds} s: {} accepted, {} refused, {} of these by a caught panic, {} panics",
            total.cases,
            total.accepted,
            total.refused,
            total.caught.len(),
            total.panics.len()
        );
    }
    for line in total.caught.iter().take(20).chain(&total.panics) {
        println!("{line}");
    }
    std::process::exit(i32::from(!total.panics.is_empty()));
}
