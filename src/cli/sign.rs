//! `peft sign`.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::Context;
use crate::error::{Error, Result};
use crate::sign;

pub(super) const EXAMPLES: &str = "\
Examples:
  peft sign --generate keys/release                  keys/release.key, keys/release.pub
  peft sign runs/pets/adapter --key keys/release.key
  peft inspect runs/pets/adapter --verify --trusted-key keys/release.pub
  peft predict --model path/to/clip --adapter adapter --trusted-key keys/release.pub photo.png

An encrypted key's password is read from PEFT_KEY_PASSWORD. Signatures are minisign's: minisign -Vm B3SUMS -p release.pub";

/// The password of a secret key.
const PASSWORD: &str = "PEFT_KEY_PASSWORD";

/// Arguments of `peft sign`.
#[derive(Debug, Args)]
pub(super) struct SignArgs {
    /// An adapter's directory, or a file
    #[arg(required_unless_present = "generate", value_name = "PATH")]
    path: Option<PathBuf>,
    /// The secret key: of minisign's, or made by --generate
    #[arg(long, value_name = "FILE", required_unless_present = "generate")]
    key: Option<PathBuf>,
    /// Make a key pair, NAME.key and NAME.pub; with PEFT_KEY_PASSWORD set the secret one is encrypted
    #[arg(long, value_name = "NAME", conflicts_with_all = ["path", "key"])]
    generate: Option<PathBuf>,
}

pub(super) fn run(args: &SignArgs, context: &Context) -> Result<()> {
    let password = std::env::var(PASSWORD).ok().filter(|p| !p.is_empty());
    if let Some(name) = &args.generate {
        let [secret, public] = sign::generate(name, password)?;
        let document = json!({ "key": secret, "public": public });
        return context
            .print(&document, || format!("{} keep it secret\n{} give it to those who check\n", secret.display(), public.display()));
    }
    let (Some(path), Some(key)) = (&args.path, &args.key) else {
        return Err(Error::input("peft sign", "expected a path and --key"));
    };
    let path = context.adapter(path)?;
    let signature = sign::sign(&path, key, password)?;
    context.print(&json!({ "signature": signature }), || format!("{}\n", signature.display()))
}
