//! What a person sees while something takes long: a moving line at a terminal, plain lines elsewhere.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// A step that takes a while. Says what it does when it begins, and how long it took when it is done.
#[derive(Debug)]
pub(crate) struct Task {
    what: String,
    bar: Option<ProgressBar>,
    began: Instant,
}

impl Task {
    /// Begins a step whose length is not known.
    pub(crate) fn begin(what: impl Into<String>) -> Self {
        let what = what.into();
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner().with_message(what.clone());
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        if bar.is_none() {
            eprintln!("{what} ...");
        }
        Self { what, bar, began: Instant::now() }
    }

    /// Begins a step of `total` units.
    pub(crate) fn counted(what: impl Into<String>, total: u64) -> Self {
        let task = Self::begin(what);
        if let Some(bar) = &task.bar {
            bar.set_length(total);
            if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {percent}% {eta}") {
                bar.set_style(style);
            }
        }
        task
    }

    /// So many units are done.
    pub(crate) fn at(&self, done: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        }
    }

    /// Ends the step with its result.
    pub(crate) fn done(self, result: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        eprintln!("{}: {result} ({})", self.what, seconds(self.began.elapsed()));
    }
}

/// A duration as `1.2 s`.
pub(crate) fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

/// A command as it would be typed, for `--verbose`.
pub(crate) fn command_line(command: &std::process::Command) -> String {
    let variables = command.get_envs().filter_map(|(name, value)| {
        Some(format!("{}={}", name.to_string_lossy(), quoted(&value?.to_string_lossy())))
    });
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words = words.map(|word| quoted(&word.to_string_lossy()));
    variables.chain(words).collect::<Vec<_>>().join(" ")
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+./,:@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_printed_command_can_be_pasted_into_a_shell() {
        let mut command = std::process::Command::new("qemu");
        command.args(["-append", "a b", "it's", "-m", "1G", ""]).env("X", "1 2");
        assert_eq!(command_line(&command), r"X='1 2' qemu -append 'a b' 'it'\''s' -m 1G ''");
    }
}
