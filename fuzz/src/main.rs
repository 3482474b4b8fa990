//! Drives the fuzz targets; `cargo xtask fuzz` calls it.
//!
//! `deed-fuzz [--target NAME]... [--seconds N] [--seed S] [--input FILE] [--write-corpus]`. One line for each target
//! begins with `FUZZ`; the exit status is 1 if one failed.

use deed_fuzz::engine::{Findings, Until, distil, fuzz, name_of, play, read_corpus};
use deed_fuzz::{Outcomes, TARGETS, Target};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Duration;

struct Options {
    targets: Vec<Target>,
    seconds: u64,
    seed: u64,
    failures: PathBuf,
    input: Option<PathBuf>,
    write_corpus: bool,
}

fn options() -> Result<Options, String> {
    let (seconds, seed, input, write_corpus) = (10, 1, None, false);
    let failures = PathBuf::from("target/fuzz-failures");
    let mut options = Options { targets: Vec::new(), seconds, seed, failures, input, write_corpus };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| format!("{argument} needs a value"));
        let number = |text: String| text.parse().map_err(|_| format!("{text} is no number"));
        match argument.as_str() {
            "--target" => {
                let name = value()?;
                let target = TARGETS.iter().find(|target| target.name == name);
                options.targets.push(*target.ok_or_else(|| format!("no target is called {name}"))?);
            }
            "--seconds" => options.seconds = number(value()?)?,
            "--seed" => options.seed = number(value()?)?,
            "--failures" => options.failures = value()?.into(),
            "--input" => options.input = Some(value()?.into()),
            "--write-corpus" => options.write_corpus = true,
            other => return Err(format!("unknown argument {other}")),
        }
    }
    if options.targets.is_empty() {
        options.targets = TARGETS.to_vec();
    }
    Ok(options)
}

fn main() -> ExitCode {
    let done = options().and_then(|options| match &options.input {
        Some(input) => replay(&options.targets, input),
        None => run(&options),
    });
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Plays one file.
fn replay(targets: &[Target], path: &Path) -> Result<bool, String> {
    let [target] = targets else { return Err("--input needs one --target".to_owned()) };
    let input = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let mut outcomes = Outcomes::default();
    let played = play(target, &input, &mut outcomes);
    match &played {
        Ok(()) => println!(
            "{}: {} bytes, {} outcomes, nothing failed",
            target.name,
            input.len(),
            outcomes.seen().len()
        ),
        Err(message) => println!("{}: {message}", target.name),
    }
    Ok(played.is_ok())
}

/// Runs targets, one on each CPU.
fn run(options: &Options) -> Result<bool, String> {
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let queue = Mutex::new(options.targets.iter());
    let next = || queue.lock().ok().and_then(|mut queue| queue.next());
    let all = Mutex::new(Ok(true));
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(target) = next() {
                    let result = run_one(options, target);
                    if let Ok(mut all) = all.lock() {
                        *all = match (std::mem::replace(&mut *all, Ok(true)), result) {
                            (Ok(a), Ok(b)) => Ok(a && b),
                            (Err(error), _) | (_, Err(error)) => Err(error),
                        };
                    }
                }
            });
        }
    });
    all.into_inner().map_err(|_| "a worker has failed".to_owned())?
}

fn run_one(options: &Options, target: &Target) -> Result<bool, String> {
    let folder = target.corpus();
    let corpus = read_corpus(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let until = Until::Time(Duration::from_secs(options.seconds));
    let found = fuzz(target, &corpus, options.seed, until, &options.failures);
    report(target, options.seed, &found);
    if options.write_corpus && found.failure.is_none() {
        write_corpus(target, &folder, &found).map_err(|error| format!("{}: {error}", folder.display()))?;
    }
    Ok(found.failure.is_none())
}

fn report(target: &Target, seed: u64, found: &Findings) {
    let steps = match found.steps {
        0 => String::new(),
        steps => format!(" ({} steps a second)", found.per_second(steps)),
    };
    println!(
        "FUZZ {}: {} executions in {:.1} s of a processor, {} a second{steps}, corpus {}, {} outcomes, \
         seed {seed}: {}",
        target.name,
        found.executions,
        found.duration.as_secs_f64(),
        found.per_second(found.executions),
        found.corpus,
        found.outcomes,
        match &found.failure {
            None => "nothing failed".to_owned(),
            Some(failure) => format!("{} (input: {})", failure.message, failure.path.display()),
        }
    );
}

/// Inputs that found something once: their files begin so, and are never replaced.
const KEEP: &str = "keep-";

/// Replaces a corpus by a small one that has its outcomes and the new ones.
fn write_corpus(target: &Target, folder: &Path, found: &Findings) -> std::io::Result<()> {
    let chosen = distil(target, &found.kept);
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with(KEEP) {
            std::fs::remove_file(entry.path())?;
        }
    }
    for input in &chosen {
        std::fs::write(folder.join(name_of(target, input)), input)?;
    }
    let bytes: usize = chosen.iter().map(Vec::len).sum();
    println!("{}: {} inputs, {bytes} bytes", folder.display(), chosen.len());
    Ok(())
}
