//! Plays the committed corpus, and mutations of it for a while: `DEED_FUZZ_SECONDS` for each target.

use deed_fuzz::engine::{Until, fuzz, read_corpus};
use deed_fuzz::{TARGETS, Target};
use std::path::Path;
use std::time::Duration;

/// Seconds for each target where nothing else is asked for. `cargo xtask fuzz` takes longer.
const SECONDS: u64 = 2;
/// Bounds of the corpus: it is to be looked at, and played by everybody.
const MOST_FILES: usize = 200;
const MOST_BYTES: usize = 200 << 10;

fn run(name: &str) {
    let target: &Target = TARGETS.iter().find(|target| target.name == name).expect("a target");
    let corpus = read_corpus(&target.corpus()).expect("a corpus");
    assert!(!corpus.is_empty());
    let seconds =
        std::env::var("DEED_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(SECONDS);
    let until = Until::Time(Duration::from_secs(seconds));
    let failures = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz-failures");
    let found = fuzz(target, &corpus, 1, until, &failures);
    println!(
        "{name}: {} executions, {} a second, {} outcomes",
        found.executions,
        found.per_second(found.executions),
        found.outcomes
    );
    if let Some(failure) = found.failure {
        panic!("{}\ninput: {}", failure.message, failure.path.display());
    }
    assert!(found.executions >= corpus.len() as u64);
}

#[test]
fn decoding_keeps_its_promises() {
    run("decode");
}

#[test]
fn device_trees_are_refused_or_planned_as_promised() {
    run("device-tree");
}

#[test]
fn sequences_of_calls_break_no_invariant() {
    run("calls");
}

#[test]
fn archives_and_programs_of_the_host_are_read_or_refused() {
    run("files");
}

#[test]
fn the_corpus_is_small() {
    let corpora: Vec<Vec<u8>> =
        TARGETS.iter().flat_map(|target| read_corpus(&target.corpus()).expect("a corpus")).collect();
    assert!(corpora.len() <= MOST_FILES, "{} files", corpora.len());
    assert!(corpora.iter().map(Vec::len).sum::<usize>() <= MOST_BYTES);
}
