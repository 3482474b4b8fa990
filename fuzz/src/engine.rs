//! The loop: the corpus, then mutations of it, then mutations of what had a new outcome.
//!
//! A panic of the target is a failure. The input is then made as small as it goes while it still fails, and written
//! where it can be played again. One input that takes longer than [`PATIENCE`] is a failure too, and the end of the
//! process, since nothing can stop it.

use crate::mutate::mutate;
use crate::{Outcomes, Target};
use spec::chooser::Dice;
use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

/// An input that takes longer hangs: the slowest takes milliseconds.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Tries to make a failing input smaller.
const SHRINKS: usize = 4000;
/// Mutations of one kept input before the next one's turn.
const TURNS: usize = 32;

/// How long to go on.
#[derive(Clone, Copy, Debug)]
pub enum Until {
    /// For so long.
    Time(Duration),
    /// For so many inputs, the corpus included.
    Executions(u64),
}

/// A failure.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What the target said.
    pub message: String,
    /// The smallest input that was found to fail.
    pub input: Vec<u8>,
    /// Where it was written.
    pub path: PathBuf,
}

/// What a run showed.
#[derive(Clone, Debug)]
pub struct Findings {
    /// Inputs played, the corpus included.
    pub executions: u64,
    /// Steps that these took, for a target whose inputs are several steps each.
    pub steps: u64,
    /// How long that took: processor time where the system tells it, so that what else a machine does does not
    /// count.
    pub duration: Duration,
    /// Inputs of the corpus.
    pub corpus: usize,
    /// Distinct outcomes.
    pub outcomes: usize,
    /// Inputs that had a new outcome, those of the corpus included.
    pub kept: Vec<Vec<u8>>,
    /// What failed first, if anything.
    pub failure: Option<Failure>,
}

impl Findings {
    /// How many of these, steps or executions, came in a second.
    pub fn per_second(&self, count: u64) -> u64 {
        (count as f64 / self.duration.as_secs_f64().max(1e-9)) as u64
    }
}

thread_local! {
    /// A target is running on this thread: its panics are caught and told by the engine.
    static QUIET: Cell<bool> = const { Cell::new(false) };
    static MESSAGE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Keeps what targets say when they panic, instead of printing it for each of thousands of inputs.
fn listen() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if QUIET.get() {
                MESSAGE.set(info.to_string().replace('\n', " "));
            } else {
                before(info);
            }
        }));
    });
}

/// Plays one input; what the target said if it panicked.
pub fn play(target: &Target, input: &[u8], outcomes: &mut Outcomes) -> Result<(), String> {
    listen();
    outcomes.clear();
    QUIET.set(true);
    let played = catch_unwind(AssertUnwindSafe(|| (target.run)(input, outcomes)));
    QUIET.set(false);
    played.map_err(|_| MESSAGE.take())
}

/// Reads the inputs in a folder, in the order of their names.
///
/// # Errors
/// As reading files.
pub fn read_corpus(folder: &Path) -> std::io::Result<Vec<Vec<u8>>> {
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
    paths.sort();
    paths.iter().map(std::fs::read).collect()
}

/// Processor time that this thread has had, where the system tells it: Linux does, to a tick or two.
fn processor_time() -> Option<Duration> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    text.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)
}

/// Runs a target.
pub fn fuzz(target: &Target, corpus: &[Vec<u8>], seed: u64, until: Until, failures: &Path) -> Findings {
    let watch = Watch::default();
    std::thread::scope(|scope| {
        scope.spawn(|| watch.keep(target, failures));
        let findings = Run::new(target, &watch, failures).go(corpus, seed, until);
        watch.over.store(true, Ordering::Relaxed);
        findings
    })
}

struct Run<'a> {
    target: &'a Target,
    watch: &'a Watch,
    failures: &'a Path,
    began: Instant,
    processor_began: Option<Duration>,
    executions: u64,
    steps: u64,
    seen: HashSet<u64>,
    kept: Vec<Vec<u8>>,
    outcomes: Outcomes,
}

impl<'a> Run<'a> {
    fn new(target: &'a Target, watch: &'a Watch, failures: &'a Path) -> Self {
        let (seen, kept, outcomes) = Default::default();
        let (began, processor_began) = (Instant::now(), processor_time());
        let (executions, steps) = (0, 0);
        Self { target, watch, failures, began, processor_began, executions, steps, seen, kept, outcomes }
    }

    fn go(mut self, corpus: &[Vec<u8>], seed: u64, until: Until) -> Findings {
        let mut failure = None;
        for input in corpus {
            if let Err(message) = self.once(input) {
                failure = Some(self.failure(input.clone(), message));
                break;
            }
        }
        if self.kept.is_empty() {
            self.kept.push(Vec::new());
        }
        // Each target has numbers of its own, also where several run with one seed.
        let name =
            self.target.name.bytes().fold(0u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
        let mut dice = Dice::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ name);
        while failure.is_none() && !self.is_over(until) {
            // What was found last leads on; what was found long ago has its turn too.
            let count = self.kept.len() as u64;
            let from = if dice.below(2) == 0 { count.saturating_sub(16) } else { 0 };
            let parent = (from + dice.below(count - from)) as usize;
            for _ in 0..TURNS {
                let mut input = self.kept[parent].clone();
                let other = &self.kept[dice.below(self.kept.len() as u64) as usize];
                mutate(&mut input, other, self.target.longest, &mut dice);
                if let Err(message) = self.once(&input) {
                    failure = Some(self.failure(input, message));
                    break;
                }
                if self.is_over(until) {
                    break;
                }
            }
        }
        Findings {
            executions: self.executions,
            steps: self.steps,
            duration: self.duration(),
            corpus: corpus.len(),
            outcomes: self.seen.len(),
            kept: self.kept,
            failure,
        }
    }

    /// How long this thread has worked.
    fn duration(&self) -> Duration {
        let worked = processor_time().zip(self.processor_began).map(|(now, then)| now.saturating_sub(then));
        worked.filter(|worked| !worked.is_zero()).unwrap_or_else(|| self.began.elapsed())
    }

    fn is_over(&self, until: Until) -> bool {
        match until {
            Until::Time(limit) => self.began.elapsed() >= limit,
            Until::Executions(limit) => self.executions >= limit,
        }
    }

    fn once(&mut self, input: &[u8]) -> Result<(), String> {
        self.watch.begin(input);
        self.executions += 1;
        play(self.target, input, &mut self.outcomes)?;
        self.steps += self.outcomes.steps();
        let before = self.seen.len();
        self.seen.extend(self.outcomes.seen());
        if self.seen.len() > before {
            self.kept.push(input.to_vec());
        }
        Ok(())
    }

    /// Makes a failing input smaller, and writes it.
    fn failure(&mut self, mut input: Vec<u8>, mut message: String) -> Failure {
        let mut tries = 0;
        let mut size = input.len().next_power_of_two();
        while size > 0 && tries < SHRINKS {
            let mut at = 0;
            while at < input.len() && tries < SHRINKS {
                let mut smaller = input.clone();
                smaller.drain(at..(at + size).min(input.len()));
                tries += 1;
                self.watch.begin(&smaller);
                match play(self.target, &smaller, &mut self.outcomes) {
                    Err(said) => (input, message) = (smaller, said),
                    Ok(()) => at += size,
                }
            }
            size /= 2;
        }
        let path = write_failure(self.target, self.failures, &input);
        Failure { message, input, path }
    }
}

/// Writes an input that fails; returns where, or where it could not be written.
fn write_failure(target: &Target, folder: &Path, input: &[u8]) -> PathBuf {
    let path = folder.join(name_of(target, input));
    let written = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&path, input));
    if let Err(error) = written {
        eprintln!("cannot write {}: {error}", path.display());
    }
    path
}

/// The name of an input's file.
pub fn name_of(target: &Target, input: &[u8]) -> String {
    let mut outcomes = Outcomes::default();
    outcomes.note(input);
    format!("{}-{:016x}.bin", target.name, outcomes.seen()[0])
}

/// Sees to it that a target that hangs is told of.
#[derive(Debug, Default)]
struct Watch {
    over: AtomicBool,
    begun: AtomicU64,
    input: Mutex<Vec<u8>>,
}

impl Watch {
    fn begin(&self, input: &[u8]) {
        let mut current = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        current.clear();
        current.extend_from_slice(input);
        self.begun.fetch_add(1, Ordering::Relaxed);
    }

    fn keep(&self, target: &Target, failures: &Path) {
        let (mut last, mut since) = (0, Instant::now());
        while !self.over.load(Ordering::Relaxed) {
            let begun = self.begun.load(Ordering::Relaxed);
            if begun != last {
                (last, since) = (begun, Instant::now());
            } else if since.elapsed() > PATIENCE {
                let input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
                let path = write_failure(target, failures, &input);
                eprintln!("{} hangs: its input is {}", target.name, path.display());
                std::process::abort();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A small corpus with the outcomes of all these inputs, as far as it may be so large: the input that adds most for its
/// length comes first.
pub fn distil(target: &Target, inputs: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let outcomes_of = |input: &Vec<u8>| {
        let mut outcomes = Outcomes::default();
        play(target, input, &mut outcomes).map(|()| outcomes.seen().iter().copied().collect::<HashSet<_>>())
    };
    let mut inputs: Vec<(&Vec<u8>, HashSet<u64>)> =
        inputs.iter().filter_map(|input| Some((input, outcomes_of(input).ok()?))).collect();
    let mut covered = HashSet::new();
    let mut chosen = Vec::new();
    loop {
        let gain = |seen: &HashSet<u64>, length: usize, covered: &HashSet<u64>| {
            seen.difference(covered).count() * 1000 / (length + 64)
        };
        let best = inputs
            .iter()
            .enumerate()
            .filter(|(_, (_, seen))| !seen.is_subset(&covered))
            .max_by_key(|(place, (input, seen))| (gain(seen, input.len(), &covered), usize::MAX - place));
        let Some((place, _)) = best.filter(|_| chosen.len() < target.most) else { return chosen };
        let (input, seen) = inputs.swap_remove(place);
        covered.extend(seen);
        chosen.push(input.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("deed-fuzz-{name}-{}", std::process::id()))
    }

    /// Fails once three particular bytes stand in a row, each of which is an outcome of its own.
    fn lock_of_three(data: &[u8], outcomes: &mut Outcomes) {
        for window in data.windows(3) {
            let right = window.iter().zip(b"key").take_while(|(a, b)| a == b).count();
            outcomes.note(right);
            assert!(right < 3, "open");
        }
    }

    fn add(data: &[u8], outcomes: &mut Outcomes) {
        outcomes.note(data.len().min(5));
    }

    #[test]
    fn outcomes_lead_to_an_input_that_fails_and_it_is_made_small() {
        let target = Target { name: "lock", run: lock_of_three, longest: 32, most: 9 };
        let folder = folder("lock");
        let found = fuzz(&target, &[], 1, Until::Executions(2_000_000), &folder);
        let failure = found.failure.expect("the lock is opened");
        assert_eq!(failure.input, b"key");
        assert!(failure.message.ends_with("open"), "{}", failure.message);
        assert_eq!(std::fs::read(&failure.path).unwrap(), b"key");
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_run_that_mostly_waits_has_not_worked_for_long() {
        fn wait(_: &[u8], _: &mut Outcomes) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let target = Target { name: "wait", run: wait, longest: 32, most: 9 };
        let began = Instant::now();
        let found = fuzz(&target, &[], 1, Until::Executions(40), &folder("wait"));
        assert!(!found.duration.is_zero() && found.duration <= began.elapsed());
        if processor_time().is_some_and(|time| !time.is_zero()) {
            assert!(found.duration < began.elapsed() / 2, "{:?}", found.duration);
        }
    }

    #[test]
    fn a_seed_makes_the_same_run() {
        let target = Target { name: "add", run: add, longest: 32, most: 9 };
        let run = |seed| fuzz(&target, &[vec![1]], seed, Until::Executions(3000), &folder("add")).kept;
        assert_eq!(run(5), run(5));
    }

    #[test]
    fn a_distilled_corpus_has_every_outcome_of_the_whole() {
        let target = Target { name: "add", run: add, longest: 32, most: 9 };
        let inputs: Vec<Vec<u8>> = [0, 1, 2, 2, 3, 9, 8, 7].iter().map(|length| vec![0; *length]).collect();
        let mut lengths: Vec<usize> = distil(&target, &inputs).iter().map(Vec::len).collect();
        lengths.sort_unstable();
        assert_eq!(lengths, [0, 1, 2, 3, 7]);
        assert_eq!(distil(&Target { most: 2, ..target }, &inputs).len(), 2);
    }
}
