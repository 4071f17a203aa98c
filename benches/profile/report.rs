//! Tables and flame graphs of what was recorded.

use std::collections::BTreeMap;
use std::fs::{File, create_dir_all, write};
use std::path::PathBuf;
use std::time::Duration;

use inferno::flamegraph::{self, Options};
use wuerstchen::device::profile::{Total, Work};

use super::limits::Limits;
use super::{Outcome, ms};

/// A recorded run of a part.
pub struct Run {
    pub part: String,
    pub title: &'static str,
    /// The spans that enclose a step or pass: what is reported.
    pub within: &'static [&'static str],
    /// Of the whole call.
    pub wall: Duration,
    pub totals: Vec<Total>,
}

/// What the spans of one name took together, without those inside them.
#[derive(Default)]
struct Row {
    is_op: bool,
    calls: u64,
    own: Duration,
    work: Work,
    /// The least seconds that its work could take.
    least: f64,
}

pub struct Report {
    out: Option<PathBuf>,
    limits: Limits,
    text: String,
}

impl Report {
    pub fn new(out: Option<PathBuf>, limits: Limits) -> Outcome<Self> {
        if let Some(out) = &out {
            create_dir_all(out)?;
        }
        let mut report = Report { out, limits, text: String::new() };
        report.say(&report.limits.describe())?;
        Ok(report)
    }

    pub fn say(&mut self, line: &str) -> Outcome<()> {
        println!("{line}");
        self.text += line;
        self.text.push('\n');
        Ok(())
    }

    pub fn add(&mut self, run: &Run) -> Outcome<()> {
        let whole = run.whole()?;
        let (passes, time) = (whole.calls as f64, ms(whole.time));
        self.say(&format!("\n{}: {:.3} ms, the mean of {passes}", run.title, time / passes))?;
        self.say(&format!(
            "{:<20} {:>7} {:>11} {:>6} {:>9} {:>7} {:>9}",
            "own time of", "calls", "ms", "%", "GFLOP/s", "GB/s", "% of limit"
        ))?;
        for (name, row) in self.rows(run) {
            let share = ms(row.own) / time * 100.;
            let calls = row.calls as f64 / passes;
            let own = ms(row.own) / passes;
            let name = if row.is_op { name.to_owned() } else { format!("({name})") };
            self.say(&format!("{name:<20} {calls:>7.1} {own:>11.3} {share:>6.1} {}", row.rates()))?;
        }
        let outside: Duration = run.inside().filter(|t| !t.is_op).map(|t| t.own).sum();
        self.say(&format!(
            "no op: {:.3} ms, {:.1} %; in brackets",
            ms(outside) / passes,
            ms(outside) / time * 100.
        ))?;
        self.say(&run.by_block())?;
        self.say(&run.beside())?;
        self.draw(run)
    }

    /// Per name, the slowest first.
    fn rows<'a>(&self, run: &'a Run) -> Vec<(&'a str, Row)> {
        let mut rows: BTreeMap<&str, Row> = BTreeMap::new();
        for total in run.inside() {
            let row = rows.entry(total.name).or_default();
            row.is_op = total.is_op;
            row.calls += total.calls;
            row.own += total.own;
            row.work.flops += total.work.flops;
            row.work.bytes += total.work.bytes;
            row.least += self.limits.seconds(total.work, total.calls);
        }
        let mut rows: Vec<_> = rows.into_iter().collect();
        rows.sort_by_key(|(_, row)| std::cmp::Reverse(row.own));
        rows
    }

    /// The folded stacks and the flame graph.
    fn draw(&self, run: &Run) -> Outcome<()> {
        let Some(out) = &self.out else { return Ok(()) };
        let passes = u128::from(run.whole()?.calls);
        let lines = run.inside().map(|t| format!("{} {}", t.stack.join(";"), t.own.as_nanos() / passes));
        let lines: Vec<String> = lines.collect();
        write(out.join(format!("{}.folded", run.part)), lines.join("\n") + "\n")?;
        let mut options = Options::default();
        options.title = run.title.into();
        options.subtitle = Some(format!("wall time, {} threads", self.limits.threads));
        options.count_name = "ns".into();
        options.name_type = "Span:".into();
        // In the order in which they ran, which inferno takes from the last to the first.
        options.flame_chart = true;
        options.hash = true;
        let file = File::create(out.join(format!("{}.svg", run.part)))?;
        Ok(flamegraph::from_lines(&mut options, lines.iter().rev().map(String::as_str), file)?)
    }

    pub fn end(self) -> Outcome<()> {
        let Some(out) = &self.out else { return Ok(()) };
        write(out.join("profile.txt"), &self.text)?;
        println!("\nwritten: {}", out.join("profile.txt").display());
        println!("flame graphs: {}", out.join("*.svg").display());
        Ok(())
    }
}

impl Row {
    fn rates(&self) -> String {
        let seconds = self.own.as_secs_f64();
        let rate = |amount: u64, width: usize| match amount {
            0 => format!("{:>width$}", ""),
            _ => format!("{:>width$.1}", amount as f64 / seconds / 1e9),
        };
        let share =
            if self.least > 0. { format!("{:>9.0}", self.least / seconds * 100.) } else { String::new() };
        format!("{} {} {share}", rate(self.work.flops, 9), rate(self.work.bytes, 7))
    }
}

impl Run {
    /// All stacks within a step or pass, its own first.
    fn inside(&self) -> impl Iterator<Item = &Total> {
        self.totals
            .iter()
            .filter(|t| t.stack.iter().map(String::as_str).zip(self.within).all(|(a, b)| a == *b))
            .filter(|t| t.stack.len() >= self.within.len())
    }

    fn whole(&self) -> Outcome<&Total> {
        Ok(self.inside().next().ok_or_else(|| format!("{}: no span {:?}", self.part, self.within))?)
    }

    /// Spans that are no ops, with all that is in them: where one lies within another of its name, it is in that.
    fn by_block(&self) -> String {
        let mut blocks: BTreeMap<&str, Duration> = BTreeMap::new();
        let of_name = |stack: &str| stack.split('.').next().unwrap_or_default().to_owned();
        for total in self.inside().skip(1).filter(|t| !t.is_op) {
            let outer = &total.stack[..total.stack.len() - 1];
            if !outer.iter().any(|outer| of_name(outer) == total.name) {
                *blocks.entry(total.name).or_default() += total.time;
            }
        }
        let whole = self.inside().next().map_or(1., |whole| ms(whole.time));
        let shares = blocks.iter().map(|(name, time)| format!("{name} {:.1} %", ms(*time) / whole * 100.));
        let shares: Vec<String> = shares.collect();
        format!(
            "with all that is in them: {}",
            if shares.is_empty() { "-".into() } else { shares.join(", ") }
        )
    }

    /// What the call did beside its steps or passes.
    fn beside(&self) -> String {
        let outermost: Duration = self.totals.iter().filter(|t| t.stack.len() == 1).map(|t| t.time).sum();
        let steps: Duration = self.inside().take(1).map(|t| t.time).sum();
        format!(
            "the whole call: {:.3} ms; {:.3} in no step, {:.3} in no span",
            ms(self.wall),
            ms(outermost.saturating_sub(steps)),
            ms(self.wall.saturating_sub(outermost))
        )
    }
}
