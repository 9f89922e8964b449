//! Runs as processes of their own: what one needs is measured, and what one breaks is its own.

use std::io::{Read as _, Seek as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use candle_core::Device;
use serde_json::Value;

use crate::compare::{BaseMeasured, Checked, Job, Measured, Runner, Second};
use crate::error::{Error, Result};
use crate::measure::{self, Measurer};
use crate::provenance::Provenance;
use crate::recipe::Recipe;

/// How often a process is looked at.
const LOOK: Duration = Duration::from_millis(30);

/// How long a directory in use is waited for.
const PATIENCE: Duration = Duration::from_secs(20);

/// Steps whose median is taken as a step's time.
const PACE_STEPS: &str = "5";

/// Starts this program for each run.
pub(super) struct Processes {
    pub(super) device: Device,
    pub(super) device_name: String,
    pub(super) threads: usize,
    measurer: Measurer,
}

impl Processes {
    pub(super) fn new(device: Device, device_name: String, threads: usize) -> Self {
        Self { device, device_name, threads, measurer: Measurer::default() }
    }

    fn command(&self, verb: &str, recipe: &Path, threads: usize) -> Result<Command> {
        let program = std::env::current_exe().map_err(|e| Error::fault("this program's own path", e))?;
        let mut command = Command::new(program);
        command.arg(verb).arg(recipe).args(["--json", "--quiet", "--device", &self.device_name, "--threads", &threads.to_string()]);
        // Ctrl-C on a terminal goes to a whole group; here the parent passes it on, once.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        Ok(command)
    }

    fn json(&self, command: Command) -> Result<Value> {
        let text = output(command, &|| None)?;
        serde_json::from_str(&text).map_err(|e| Error::fault("a process of this comparison", e))
    }
}

/// Runs a process to its end; closes its stdin when `stop` says so. What it printed.
fn output(mut command: Command, stop: &dyn Fn() -> Option<i32>) -> Result<String> {
    let fail = |e: std::io::Error| {
        Error::fault(command_name(), e)
            .hint("it could not be started or looked at: use fewer --jobs, or raise the limits (ulimit -u, ulimit -n)")
    };
    // Files, not pipes: nobody has to read them meanwhile.
    let temporary = || tempfile::tempfile().map_err(|e| no_room(Error::write(std::env::temp_dir(), e)));
    let (out, err) = (temporary()?, temporary()?);
    command.stdin(Stdio::piped()).stdout(out.try_clone().map_err(fail)?).stderr(err.try_clone().map_err(fail)?);
    let mut child = command.spawn().map_err(fail)?;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(fail)? {
            break status;
        }
        if stop().is_some() {
            close(&mut child);
        }
        std::thread::sleep(LOOK);
    };
    let read = |mut file: std::fs::File| {
        let mut text = String::new();
        file.rewind().and_then(|()| file.read_to_string(&mut text)).map_err(fail).map(|_| text)
    };
    if status.success() {
        return read(out);
    }
    if let Some(signal) = stop() {
        return Err(Error::Interrupted { message: "stopped".into(), signal });
    }
    let said = read(err)?;
    let why = said.rsplit_once("error: ").map_or(said.trim(), |(_, why)| why.trim());
    match status.code() {
        Some(code) if why.is_empty() => Err(no_room(Error::fault(
            std::env::temp_dir().display(),
            format!("the process ended with exit code {code}, and what it said could not be kept here"),
        ))),
        Some(2) => Err(Error::input("", why)),
        Some(_) => Err(Error::fault("", why)),
        None => Err(Error::fault("", format!("the process was killed ({status}); perhaps for want of memory"))
            .hint("try fewer --jobs, or a smaller batch")),
    }
}

/// What processes say goes through temporary files.
fn no_room(error: Error) -> Error {
    error.hint("what the runs say is kept in temporary files: make room, or name another directory by TMPDIR")
}

/// The program that is started for each run.
fn command_name() -> String {
    std::env::current_exe().map_or("this program".into(), |path| path.display().to_string())
}

fn close(child: &mut Child) {
    drop(child.stdin.take());
}

impl Runner for Processes {
    fn check(&self, recipe: &Path) -> Result<Checked> {
        let mut command = self.command("train", recipe, self.threads)?;
        command.arg("--check");
        let found = self.json(command)?;
        let parts = found["memory"].as_object().into_iter().flat_map(|m| m.values()).filter_map(Value::as_u64);
        Ok(Checked { bytes: parts.sum() })
    }

    fn pace(&self, recipe: &Path) -> Result<f64> {
        let mut command = self.command("bench", recipe, self.threads)?;
        command.args(["--steps", PACE_STEPS]);
        let found = self.json(command)?;
        let seconds = |v: &Value| v.as_f64().unwrap_or(0.0);
        Ok(seconds(&found["step_seconds"]["median"]) + seconds(&found["data_seconds"]))
    }

    fn train(&self, job: &Job, stop: &dyn Fn() -> Option<i32>) -> Result<()> {
        // A process whose parent was killed saves its state before it lets go of the directory.
        let begun = Instant::now();
        while in_use(&job.dir) && stop().is_none() && begun.elapsed() < PATIENCE {
            std::thread::sleep(LOOK);
        }
        let mut command = self.command("train", &job.recipe, job.threads)?;
        command.arg(if job.replace { "--force" } else { "--resume" }).arg("--stop-with-stdin");
        output(command, stop).map(drop)
    }

    fn made_of(&self, recipe: &Recipe) -> Result<Provenance> {
        measure::made_of(recipe, &self.device)
    }

    fn second_made_of(&self, recipe: &Recipe, second: &Second) -> Result<Provenance> {
        self.measurer.second_made_of(recipe, second, &self.device)
    }

    fn base(&self, recipe: &Recipe, second: &Second) -> Result<BaseMeasured> {
        self.measurer.base(recipe, second, &self.device)
    }

    fn measure(&self, run: &Path, second: &Second) -> Result<Measured> {
        self.measurer.run(run, second, &self.device)
    }

    fn pictures(&self, recipe: &Recipe, ids: &[String]) -> Result<Vec<String>> {
        measure::pictures(recipe, ids)
    }
}

/// Whether another process works on a run. One that goes on for long is a user's own; the run then says so itself.
fn in_use(dir: &Path) -> bool {
    let lock = std::fs::File::open(dir.join("lock"));
    lock.is_ok_and(|file| file.try_lock_shared().is_err())
}
