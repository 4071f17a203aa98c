//! The command line.

use std::collections::HashMap;
use std::path::PathBuf;

use wuerstchen::training::Goal;

use crate::Outcome;

/// What the command line says.
pub struct Arguments {
    pub data: PathBuf,
    pub out: PathBuf,
    pub configs: PathBuf,
    pub from: Option<PathBuf>,
    pub seed: u64,
    pub batch: usize,
    pub threads: u32,
    /// Steps between two checkpoints, and between two grids.
    pub save_every: u64,
    pub grid_every: u64,
    /// Training options by name, as `TrainOptions::set` takes them.
    pub set: Vec<(String, String)>,
    only: Option<Vec<Goal>>,
    steps: HashMap<String, u64>,
}

/// Names on the command line, and how long each part is trained by default: about two hours of two cores in all.
const PARTS: [(&str, Goal, u64); 4] = [
    ("pair", Goal::Pair, 3_000),
    ("a", Goal::StageA, 3_000),
    ("b", Goal::StageB, 12_000),
    ("c", Goal::StageC, 12_000),
];

const USAGE: &str = "usage: train DATA OUT [--from MODEL | --configs DIR] [--only pair,a,b,c] [--steps PART=N]… \
    [--batch N] [--seed N] [--threads N] [--save-every N] [--grid-every N] [--set OPTION=VALUE]…";

impl Arguments {
    pub fn parse() -> Outcome<Self> {
        let mut places = Vec::new();
        let mut parsed = Arguments {
            data: PathBuf::new(),
            out: PathBuf::new(),
            configs: "examples/train/emoji".into(),
            from: None,
            seed: 0,
            batch: 32,
            threads: 0,
            save_every: 200,
            grid_every: 1_000,
            set: Vec::new(),
            only: None,
            steps: HashMap::new(),
        };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            if !word.starts_with("--") {
                places.push(PathBuf::from(word));
                continue;
            }
            let value = words.next().ok_or_else(|| format!("{word}: a value must follow\n{USAGE}"))?;
            let pair =
                || value.split_once('=').ok_or_else(|| format!("{word} {value}: NAME=VALUE must follow"));
            match word.as_str() {
                "--from" => parsed.from = Some(value.into()),
                "--configs" => parsed.configs = value.into(),
                "--only" => parsed.only = Some(value.split(',').map(goal).collect::<Outcome<_>>()?),
                "--steps" => {
                    let (part, steps) = pair()?;
                    goal(part)?;
                    parsed.steps.insert(part.into(), steps.parse()?);
                }
                "--set" => {
                    let (name, value) = pair()?;
                    parsed.set.push((name.into(), value.into()));
                }
                "--batch" => parsed.batch = value.parse()?,
                "--seed" => parsed.seed = value.parse()?,
                "--threads" => parsed.threads = value.parse()?,
                "--save-every" => parsed.save_every = value.parse::<u64>()?.max(1),
                "--grid-every" => parsed.grid_every = value.parse::<u64>()?.max(1),
                _ => return Err(format!("{word}: unknown\n{USAGE}").into()),
            }
        }
        let [data, out] = places.try_into().map_err(|_| USAGE)?;
        Ok(Arguments { data, out, ..parsed })
    }

    pub fn wants(&self, goal: Goal) -> bool {
        self.only.as_ref().is_none_or(|only| only.contains(&goal))
    }

    pub fn steps(&self, goal: Goal) -> u64 {
        let default = PARTS.iter().find(|part| part.1 == goal).map_or(0, |part| part.2);
        self.steps.get(name(goal)).copied().unwrap_or(default)
    }
}

/// What a part is called on the command line and in files.
pub fn name(goal: Goal) -> &'static str {
    PARTS.iter().find(|part| part.1 == goal).map_or("", |part| part.0)
}

fn goal(name: &str) -> Outcome<Goal> {
    let part = PARTS.iter().find(|part| part.0 == name);
    part.map(|part| part.1).ok_or_else(|| format!("{name}: expected pair, a, b or c").into())
}
