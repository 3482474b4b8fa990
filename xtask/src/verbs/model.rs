//! `cargo xtask model`: visits every state of the small worlds of `spec`.

use crate::report::{Check, Report};
use crate::toolchain::Toolchain;
use crate::ui::Task;
use anyhow::{Context, Result};
use spec::call::{CALLS, OUTCOMES};
use spec::worlds::WORLDS;
use std::path::PathBuf;

/// States that a run visits at the least, all worlds together.
const LEAST_STATES: u64 = 1_000_000;

/// Explore the specification of memory ownership: every state of small worlds, every call in each.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only this world: hostile, honest or runs.
    world: Option<String>,
    /// Write the result as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<bool> {
    Report::new("model").around(args.json.as_deref(), |report| {
        report.env.rustc = Toolchain::version_of_build_machine();
        let mut checks = Vec::new();
        let mut pairs = [[0; OUTCOMES.len()]; CALLS.len()];
        let (mut states, mut depth) = (0, 0);
        let names: Vec<&str> = match &args.world {
            Some(name) => vec![name],
            None => WORLDS.to_vec(),
        };
        for name in names {
            let task = Task::begin(format!("world {name}"));
            let found = spec::worlds::explore(name).with_context(|| format!("no world is called {name}"))?;
            task.done(&format!("{} states, depth {}, {} calls", found.states, found.depth, found.steps));
            states += found.states as u64;
            depth = depth.max(found.depth as u64);
            for (sum, row) in pairs.iter_mut().flatten().zip(found.pairs.iter().flatten()) {
                *sum += row;
            }
            let observed = match &found.broken {
                None => "no invariant broken".to_owned(),
                Some((what, story)) => {
                    println!("{what}, in world {name}, after");
                    story.iter().for_each(|call| println!("    {call}"));
                    format!("{what}: {}", story.join("; "))
                }
            };
            checks.push(Check::new(name, "no invariant broken", observed, found.broken.is_none()));
        }
        print_pairs(&pairs);
        if args.world.is_none() {
            let others = spec::worlds::differences(&pairs);
            others.iter().for_each(|difference| println!("{difference}"));
            let observed = if others.is_empty() { "those".to_owned() } else { others.join("; ") };
            checks.push(Check::new("outcomes", "those that are listed", observed, others.is_empty()));
            let enough = states >= LEAST_STATES;
            checks.push(Check::new("states", format!("{LEAST_STATES} or more"), states.to_string(), enough));
        }
        let pass = checks.iter().all(|check| check.pass);
        println!("{}: {states} distinct states, depth {depth}", if pass { "PASSED" } else { "FAILED" });
        report.distinct_states = Some(states);
        report.depth = Some(depth);
        report.steps = Some(checks);
        Ok(pass)
    })
}

/// Prints what came of each call, and how often.
fn print_pairs(pairs: &spec::explore::Pairs) {
    let mut reached = 0;
    for (call, row) in CALLS.iter().zip(pairs) {
        let seen = OUTCOMES.iter().zip(row).filter(|(_, count)| **count > 0);
        let seen: Vec<String> = seen.map(|(outcome, count)| format!("{outcome} {count}")).collect();
        reached += seen.len();
        println!("{call:18} {}", seen.join(", "));
    }
    println!("{reached} pairs of a call and an outcome");
}
