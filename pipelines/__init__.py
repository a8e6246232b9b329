"""diffusers pipelines. Imported as `imgdit.pipelines`."""
