//! Runs the guest tests: named as `KERNEL::TEST`, many on one emulated host, one after another on each; the hosts of
//! different kernels run beside each other, as each takes one processor, and none waits for another's test to end.
//!
//! A test leaves the host as it found it. That is checked after every test: what runs, is mounted, locked, bound or lies
//! about is compared with before. A test that fails, or leaves something behind, costs its host, and the next test gets a fresh
//! one. The first test on each kernel is that its host comes up.

use std::any::Any;
use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Conclusion, Failed, Trial};

use crate::artifacts;
use crate::command::CommandError;
use crate::host::channel::HostError;
use crate::host::inventory::{Inventory, differences};
use crate::host::machine::Machine;
use crate::progress::{note, plain_lines_only, step};
use crate::provision::SERIES;
use crate::provision::kernel::Kernel;
use crate::setup::{Setup, StartError};
use crate::shell;
use crate::tests::{self, GuestTest, Lab, TestError};

/// Where tests put files on the host; removed after each.
pub const SCRATCH: &str = "/tmp/scratch";
/// Name under which the workspace's own tests appear beside the guest tests.
const WORKSPACE_TEST: &str = "workspace::unit_and_property_tests";
const HOST_TEST: &str = "host_comes_up";
/// How many of the tests that took longest are told of.
const SLOWEST: usize = 20;

/// What to run.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Parts of names; everything when empty.
    pub names: Vec<String>,
    /// Long repeat counts.
    pub full: bool,
    /// Opens a shell on the host of the first test that fails.
    pub keep: bool,
}

impl Selection {
    fn has(&self, name: &str) -> bool {
        is_chosen(name, &self.names)
    }
}

/// Whether a name has one of these parts; any name when none is asked for.
pub fn is_chosen(name: &str, parts: &[String]) -> bool {
    parts.is_empty() || parts.iter().any(|part| name.contains(part.as_str()))
}

/// What all tests on one kernel share; they run one at a time.
struct Runner {
    setup: Arc<Setup>,
    kernel: Kernel,
    full: bool,
    /// Whether a shell is wanted on the host of the next test that fails, on whichever kernel.
    keep: Arc<AtomicBool>,
    durations: Durations,
    /// The host that is up, and how it was before any test.
    current: Option<(Lab, Inventory)>,
}

/// How long each test took, on whichever kernel.
#[derive(Clone, Debug, Default)]
struct Durations(Arc<Mutex<Vec<(Duration, String)>>>);

impl Durations {
    fn add(&self, name: &str, duration: Duration) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.push((duration, name.to_owned()));
    }

    /// The longest ones, a line each, longest first.
    fn longest(&self, count: usize) -> Vec<String> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.sort_by(|one, other| other.cmp(one));
        all.iter()
            .take(count)
            .map(|(duration, name)| format!("{:6.1} s {name}", duration.as_secs_f64()))
            .collect()
    }
}

/// Why a test counts as failed.
#[derive(Debug, thiserror::Error)]
enum Verdict {
    #[error(transparent)]
    Test(#[from] TestError),
    #[error("panic: {0}")]
    Panic(String),
    #[error("the host is not as it was before:\n{}", .0.join("\n"))]
    Untidy(Vec<String>),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("cannot look at the host after the test")]
    Inventory(#[source] HostError),
}

/// Runs the selected tests. `workspace` is how the workspace's own tests went, if they were to run.
pub fn run(
    setup: Setup,
    selection: &Selection,
    workspace: Option<Result<(), CommandError>>,
) -> Conclusion {
    let kernels = setup.provisioned.kernels.clone();
    say_which(&kernels);
    plain_lines_only();
    let mut all = Vec::new();
    if let Some(outcome) = workspace {
        all.push(Trial::test(WORKSPACE_TEST, move || {
            outcome.map_err(|error| Failed::from(chain(&error)))
        }));
    }
    let setup = Arc::new(setup);
    let keep = Arc::new(AtomicBool::new(selection.keep));
    let durations = Durations::default();
    let mut queues = Vec::new();
    for kernel in kernels {
        let runner = Runner {
            setup: Arc::clone(&setup),
            kernel,
            full: selection.full,
            keep: Arc::clone(&keep),
            durations: durations.clone(),
            current: None,
        };
        let (queue, trials) = queue(runner, selection);
        queues.push(queue);
        all.extend(trials);
    }
    // The library only tells what comes out: a thread of its waits for each test, so that it is told of when it ends.
    let arguments = Arguments {
        test_threads: Some(all.len().max(1)),
        ..Arguments::default()
    };
    let processors = thread::available_parallelism().map_or(1, NonZero::get);
    // A shell takes the terminal, so then everything waits for it.
    let at_once = if selection.keep { 1 } else { processors };
    let queues = Mutex::new(queues.into_iter());
    let conclusion = thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| each(&queues, Queue::work));
        }
        libtest_mimic::run(&arguments, all)
    });
    let longest = durations.longest(SLOWEST);
    if !longest.is_empty() {
        note(&format!("took longest:\n{}", longest.join("\n")));
    }
    conclusion
}

/// The selected tests on one kernel, for one thread.
struct Queue {
    runner: Runner,
    tests: Vec<Queued>,
}

/// A test, and who waits for what comes out.
struct Queued {
    test: GuestTest,
    name: String,
    outcome: Sender<Result<(), String>>,
}

impl Queue {
    fn work(mut self) {
        for queued in self.tests {
            let outcome = self.runner.run(&queued.test, &queued.name);
            // Nobody waits any more when the whole run is being given up.
            let _ = queued.outcome.send(outcome);
        }
    }
}

/// Does this with one after the other, beside others that do so, until there is none left.
fn each<T>(queue: &Mutex<impl Iterator<Item = T>>, does: impl Fn(T)) {
    let next = || {
        let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.next()
    };
    while let Some(item) = next() {
        does(item);
    }
}

/// The selected tests on a runner's kernel, and the trials that tell of them.
fn queue(runner: Runner, selection: &Selection) -> (Queue, Vec<Trial>) {
    let host_test = GuestTest {
        name: HOST_TEST,
        run: |_| Ok(()),
    };
    let kernel = runner.kernel.name.clone();
    let mut tests = Vec::new();
    let mut trials = Vec::new();
    for test in std::iter::once(host_test).chain(tests::all(&kernel)) {
        let name = format!("{kernel}::{}", test.name);
        if !selection.has(&name) {
            continue;
        }
        let (outcome, awaited) = channel();
        trials.push(Trial::test(name.clone(), move || told(&awaited)));
        tests.push(Queued {
            test,
            name,
            outcome,
        });
    }
    (Queue { runner, tests }, trials)
}

/// Waits for what a queue says of a test.
fn told(outcome: &Receiver<Result<(), String>>) -> Result<(), Failed> {
    let Ok(outcome) = outcome.recv() else {
        return Err(Failed::from(
            "the thread that runs this kernel's tests has ended",
        ));
    };
    outcome.map_err(Failed::from)
}

/// Whether any guest test has one of these names.
pub fn any_guest_test(selection: &Selection, kernels: &[Kernel]) -> bool {
    let names = |kernel: &Kernel| {
        let tests = tests::all(&kernel.name).into_iter();
        tests.map(|test| test.name).chain([HOST_TEST])
    };
    kernels
        .iter()
        .any(|kernel| names(kernel).any(|name| selection.has(&format!("{}::{name}", kernel.name))))
}

/// Runs the workspace's own tests.
pub fn run_workspace_tests(workspace: &artifacts::Workspace) -> Result<(), CommandError> {
    step("unit and property tests", || artifacts::test(workspace))
}

impl Runner {
    fn run(&mut self, test: &GuestTest, name: &str) -> Result<(), String> {
        let begun = Instant::now();
        let verdict = self.run_on_host(test);
        self.durations.add(name, begun.elapsed());
        let Err(verdict) = verdict else { return Ok(()) };
        let evidence = self
            .current
            .as_ref()
            .map_or(String::new(), |(lab, _)| lab.host.evidence());
        let message = format!("{}\n{evidence}", chain(&verdict));
        if self.keep.swap(false, Ordering::Relaxed) {
            self.open_shell(name, &message);
        }
        self.current = None;
        Err(message)
    }

    fn run_on_host(&mut self, test: &GuestTest) -> Result<(), Verdict> {
        let (lab, before) = self.host()?;
        lab.host.forget_programs();
        match catch_unwind(AssertUnwindSafe(|| (test.run)(lab))) {
            Ok(outcome) => outcome?,
            Err(panic) => return Err(Verdict::Panic(panic_message(panic.as_ref()))),
        }
        let mut after = lab.host.inventory().map_err(Verdict::Inventory)?;
        if after.files.iter().any(|file| file == SCRATCH) {
            lab.host
                .check(&["rm", "-rf", SCRATCH])
                .map_err(Verdict::Inventory)?;
            after.files.retain(|file| file != SCRATCH);
        }
        let changes = differences(before, &after);
        if changes.is_empty() {
            Ok(())
        } else {
            Err(Verdict::Untidy(changes))
        }
    }

    /// The host, booted when it is not up.
    fn host(&mut self) -> Result<&mut (Lab, Inventory), Verdict> {
        if self.current.is_none() {
            let host = self.setup.boot(&self.kernel, Machine::default())?;
            let before = host.inventory().map_err(Verdict::Inventory)?;
            self.current = Some((
                Lab {
                    host,
                    kernel: self.kernel.clone(),
                    full: self.full,
                    setup: Arc::clone(&self.setup),
                },
                before,
            ));
        }
        match &mut self.current {
            Some(current) => Ok(current),
            None => Err(Verdict::Untidy(vec!["the host was lost".to_owned()])),
        }
    }

    fn open_shell(&mut self, name: &str, message: &str) {
        let Some((lab, _)) = &self.current else {
            return;
        };
        eprintln!(
            "\n{message}\nlab: {name} has failed; a shell on its host follows, `exit` goes on"
        );
        match shell::run(&lab.host, &[]) {
            Ok(_) => {}
            Err(error) => eprintln!("lab: {}", chain(&error)),
        }
        let logs = self.setup.keep_logs().display().to_string();
        note(&format!("logs stay in {logs}"));
    }
}

fn say_which(kernels: &[Kernel]) {
    let found: Vec<String> = kernels
        .iter()
        .map(|kernel| format!("{} ({})", kernel.name, kernel.release))
        .collect();
    note(&format!("host kernels: {}", found.join(", ")));
    for series in SERIES {
        if !kernels.iter().any(|kernel| kernel.name == series) {
            note(&format!(
                "host kernel {series}: not among them (not asked for, or not in this distribution's package sources)"
            ));
        }
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_default()
}

/// An error and what caused it, one line each.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str("\n  because: ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests_of_selection {
    use super::*;
    use crate::provision::lab_kernel;

    #[test]
    fn a_part_of_the_name_selects() {
        let selection = Selection {
            names: vec!["6.12::boots".into(), "reboot".into()],
            ..Selection::default()
        };
        assert!(selection.has("6.12::boots_on_one_dax_zone"));
        assert!(selection.has("6.1::reboots"));
        assert!(!selection.has("6.1::boots_on_one_dax_zone"));
        assert!(Selection::default().has("anything"));
    }

    #[test]
    fn queues_are_worked_off_by_whoever_is_free() {
        let done = Mutex::new(Vec::new());
        let queues = Mutex::new([1, 2, 3].into_iter().map(|number| {
            let done = &done;
            move || {
                done.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(number);
            }
        }));
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| each(&queues, |queue| queue()));
            }
        });
        let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
        done.sort_unstable();
        assert_eq!(done, [1, 2, 3]);
    }

    #[test]
    fn a_test_that_nobody_runs_fails() {
        let (outcome, awaited) = channel();
        drop(outcome);
        assert!(told(&awaited).is_err());
    }

    #[test]
    fn the_longest_are_told_of_longest_first() {
        let durations = Durations::default();
        for (name, seconds) in [("b", 2), ("c", 30), ("a", 1)] {
            durations.add(name, Duration::from_secs(seconds));
        }
        assert_eq!(durations.longest(2), ["  30.0 s c", "   2.0 s b"]);
        assert_eq!(durations.longest(9).len(), 3);
    }

    #[test]
    fn test_names_are_unique() {
        let tests = tests::all(lab_kernel::NAME);
        let mut names: Vec<&str> = tests.iter().map(|test| test.name).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
        assert!(!names.contains(&HOST_TEST));
        assert!(tests::all("6.12").len() < count);
    }
}
